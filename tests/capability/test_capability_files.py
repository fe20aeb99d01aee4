"""What a task's identity holds: every file that its numbers depend on, and nothing that running it writes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import capability_tasks as task_files
import pytest

from demur.capability import check_tasks, task_identity
from demur.errors import InputError


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task that includes a file without an ending, with a module beside it and data in other places."""
    monkeypatch.chdir(tmp_path)
    for name in ("tasks/sub", "shared", "data", "tasks/__pycache__"):
        (tmp_path / name).mkdir(parents=True)
    written = {
        "tasks/one.yaml": "include: ../shared/_base\ntask: one\nprocess_docs: !function sub.helpers.clean\n"
        "process_results: !function utils.score\ndoc_to_text: 'A question? [yes]'\n",
        "tasks/utils.py": "def score(): ...\n",
        "tasks/sub/helpers.py": "def clean(): ...\n",
        "tasks/sub/unrelated.txt": "x",
        "tasks/__pycache__/utils.pyc": "x",
        "shared/_base": "dataset_path: json\n"
        "dataset_kwargs: {data_files: {test: data/test.jsonl, train: [data/t*.csv]}}\n"
        "class: !function own.Task\n",
        "shared/own.py": "class Task: ...\n",
        "data/test.jsonl": "{}\n",
        "data/train.csv": "a\n",
        "data/unrelated.csv": "a\n",
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / "tasks"


def test_every_file_that_a_task_depends_on_is_in_its_identity(tasks: Path) -> None:
    root = tasks.parent
    found = task_identity(str(tasks / "one.yaml"))
    assert found["task"] == "one.yaml"
    assert found["files"] == {"one.yaml": sha(tasks / "one.yaml"), "utils.py": sha(tasks / "utils.py")}
    assert dict(cast("Any", found["elsewhere"])) == {
        "../shared/_base": sha(root / "shared/_base"),
        "sub/helpers.py": sha(tasks / "sub/helpers.py"),
        "own.py": sha(root / "shared/own.py"),
        "data/test.jsonl": sha(root / "data/test.jsonl"),
        "data/train.csv": sha(root / "data/train.csv"),
    }
    json.dumps(found)


@pytest.mark.parametrize(
    "name",
    ["tasks/one.yaml", "tasks/utils.py", "tasks/sub/helpers.py", "shared/_base", "shared/own.py", "data/train.csv"],
)
def test_a_change_of_any_of_them_changes_it(tasks: Path, name: str) -> None:
    file, folder = str(tasks / "one.yaml"), tasks
    before = task_identity(file), task_identity(folder)
    assert (task_identity(file), task_identity(folder)) == before
    with (tasks.parent / name).open("a", encoding="utf-8") as opened:
        opened.write("# changed\n")
    assert task_identity(file) != before[0]
    assert task_identity(folder) != before[1]


def test_folders_and_groups_hold_what_is_below_them(tasks: Path) -> None:
    files = cast("dict[str, str]", task_identity(tasks)["files"])
    assert [*files] == ["one.yaml", "sub/helpers.py", "sub/unrelated.txt", "utils.py"]
    (tasks / "all.yaml").write_text("group: all\ntask: [one]\n", encoding="utf-8")
    grouped = task_identity(tasks / "all.yaml")
    assert [*cast("dict[str, str]", grouped["files"])] == ["all.yaml", *files]
    (tasks / "sub" / "two.yaml").write_text("task: two\n", encoding="utf-8")
    assert task_identity(tasks / "all.yaml") != grouped


def test_what_running_a_task_writes_is_not_in_it(tmp_path: Path) -> None:
    task_files.multiple_choice(tmp_path / "tasks")
    before = task_identity(tmp_path / "tasks")
    for name in ("cache/json/data.arrow", "__pycache__/utils.pyc", "pick.lock"):
        place = tmp_path / "tasks" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("x", encoding="utf-8")
    assert task_identity(tmp_path / "tasks") == before
    (tmp_path / "tasks" / "more.json").write_text("x", encoding="utf-8")
    assert task_identity(tmp_path / "tasks") != before


def test_folders_of_data_count(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    data = tmp_path / "corpus" / "test.jsonl"
    data.write_text("{}", encoding="utf-8")
    for config in (
        {"dataset_path": "../corpus"},
        {"dataset_path": "json", "dataset_kwargs": {"data_dir": "../corpus"}},
    ):
        file = tmp_path / "tasks" / "one.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"task": "one", **config}), encoding="utf-8")
        assert task_identity(file)["elsewhere"] == [["../corpus/test.jsonl", sha(data)]]


def test_large_and_closed_files_are_known_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 200 * 1024**2
    file = tmp_path / "one.yaml"
    file.write_text("task: one\n", encoding="utf-8")
    large = tmp_path / "large.jsonl"
    large.touch()
    os.truncate(large, limit + 1)  # takes no room on the disk
    os.utime(large, ns=(5, 7_000))
    assert cast("Any", task_identity(file)["files"]) == {"large.jsonl": [limit + 1, 7_000], "one.yaml": sha(file)}
    os.truncate(large, limit)
    os.utime(large, ns=(5, 7_000))
    opened: Callable[..., Any] = Path.open

    def closed(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == large:
            raise PermissionError("closed")
        return opened(self, *args, **kwargs)

    assert cast("Any", task_identity(file)["files"])["large.jsonl"] == sha(large)
    monkeypatch.setattr(Path, "open", closed)
    assert cast("Any", task_identity(file)["files"])["large.jsonl"] == [limit, 7_000]


def test_the_home_folder_is_filled_in(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tasks.parent))
    assert task_identity("~/tasks/one.yaml") == task_identity(tasks / "one.yaml")


def test_names_are_the_harness_own_whatever_lies_about(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tasks.parent / "gsm8k").mkdir()
    versions = {"lm_eval": "0.4.13"}
    monkeypatch.setattr("importlib.metadata.version", lambda name: versions[name])
    assert task_identity("gsm8k") == {"harness": "0.4.13", "task": "gsm8k"}
    here = task_identity(tasks)
    versions["lm_eval"] = "0.5"
    assert task_identity("gsm8k") == {"harness": "0.5", "task": "gsm8k"}
    assert task_identity(tasks) != here


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no task file or folder .*nowhere\.yaml"):
        task_identity(str(tmp_path / "nowhere.yaml"))


UNREADABLE = ("task: [", "- 1", "task: !unknown x", "include: torn.yaml", "\x00")


@pytest.mark.parametrize("text", UNREADABLE)
def test_yaml_that_cannot_be_read_still_has_an_identity(tmp_path: Path, text: str) -> None:
    file = tmp_path / "torn.yaml"
    file.write_text(text, encoding="utf-8")
    assert task_identity(file)["files"] == {"torn.yaml": sha(file)}


@pytest.mark.eval
@pytest.mark.parametrize("text", UNREADABLE)
def test_yaml_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "torn.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"task torn\.yaml cannot be loaded: ValueError"):
        check_tasks([file])


@pytest.mark.eval
def test_data_that_is_not_there_is_named(tasks: Path) -> None:
    file = tasks / "one.yaml"
    check_tasks([file])
    (tasks.parent / "data/test.jsonl").unlink()
    with pytest.raises(InputError, match=r"there is no data file data/test\.jsonl"):
        check_tasks([file])
    # The file's own data replaces that of what it includes.
    text = file.read_text(encoding="utf-8")
    for data in ("data/train.csv", "hf://datasets/org/name/test.csv", "'data/*.csv'"):
        file.write_text(f"{text}dataset_kwargs: {{data_files: {data}}}\n", encoding="utf-8")
        check_tasks([file])
    (tasks.parent / "shared/_base").unlink()
    with pytest.raises(InputError, match=r"task one\.yaml cannot be loaded: FileNotFoundError.*_base"):
        check_tasks([file])
