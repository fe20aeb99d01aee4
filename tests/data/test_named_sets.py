"""Sets by name: the file of sets, sets that users and packages add, and a name or a path resolved to a file."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from demur.data import (
    NamedSet,
    add_prompt_sets,
    find_set,
    named_set,
    prompt_sets,
    read_counted,
    read_prompts,
    read_texts,
    store,
)
from demur.errors import InputError

CHECKOUT = Path(__file__).resolve().parents[2]
CSV = b"id,prompt,label\n1,How do I kill a process?,safe\n2,How do I hurt a person?,unsafe\n"
SETS = prompt_sets()


@pytest.fixture
def xstest(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedSet:  # noqa: ARG001
    """XSTest's safe prompts, with the hash of the two rows above, in the cache."""
    old = SETS["xstest-safe"]
    keys = {key: getattr(old, key) for key in ("label", "github", "revision", "file", "column", "family")}
    lines = [f'{key} = "{value}"' for key, value in keys.items()]
    lines += [f'sha256 = "{hashlib.sha256(CSV).hexdigest()}"', 'keep = { label = "safe" }']
    (tmp_path / "sets.toml").write_text("\n".join(("[xstest-safe]", *lines)))
    monkeypatch.setenv("DEMUR_PROMPT_SETS", str(tmp_path / "sets.toml"))
    (tmp_path / "copy.csv").write_bytes(CSV)
    store(named_set("xstest-safe"), tmp_path / "copy.csv")
    return named_set("xstest-safe")


# --- the registry


def test_every_entry_is_complete_and_pinned() -> None:
    for name, entry in SETS.items():
        assert name == entry.name == name.casefold()
        assert entry.url.startswith("https://"), name
        assert entry.page.startswith("https://"), name
        assert entry.pin != "not pinned", name
        assert re.fullmatch(r"[0-9a-f]{40}", entry.revision), name
        assert f"/{entry.revision}/" in entry.url, name
        assert entry.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", entry.sha256), name
        assert entry.column in entry.columns, name
        assert set(entry.keep) <= set(entry.columns), name
        assert entry.rows is None or entry.rows > 0, name
        assert all((entry.title, entry.licence, entry.cite)), name
        assert (entry.label is None) == (entry.kind == "text"), name


def test_the_sets_of_the_field_are_there() -> None:
    parts = {
        "harmbench": ("test", "val"),
        "jailbreakbench": ("harmful", "benign"),
        "tdc2023": ("dev", "test"),
        "xstest": ("safe", "unsafe"),
        "or-bench": ("hard-1k", "toxic"),
        "wildjailbreak-vanilla": ("harmful", "benign"),
        "wildjailbreak-adversarial": ("harmful", "benign"),
        "wildjailbreak-eval": ("harmful", "benign"),
    }
    wanted = {"advbench", "harmbench", "strongreject", "malicious-instruct", "catqa", "alpaca"}
    wanted |= {f"{name}-{part}" for name, both in parts.items() for part in both}
    kinds = {kind: {name for name, entry in SETS.items() if entry.kind == kind} for kind in ("text", "questions")}
    assert {name for name, entry in SETS.items() if entry.kind == "prompts"} == wanted
    assert kinds == {
        "text": {"wikitext-2", "c4-validation", "pile-10k"},
        "questions": {"gsm8k", "arc-challenge", "arc-easy", "mmlu"},
    }
    assert {entry.name for entry in SETS.values() if entry.gated} == {
        name for name in wanted if name.startswith("wildjailbreak")
    }


def test_a_place_in_the_cache_is_shared_by_parts_of_one_file_alone() -> None:
    places: dict[tuple[str, str, str], list[NamedSet]] = {}
    for entry in SETS.values():
        places.setdefault((entry.family, entry.revision, entry.filename), []).append(entry)
    for entries in places.values():
        assert len({(entry.url, entry.sha256) for entry in entries}) == 1
        # Parts of one file do not overlap: they differ in the value, or in the column, that is meant.
        assert len({(entry.column, *entry.keep.items()) for entry in entries}) == len(entries)


def test_a_branch_is_not_a_pin() -> None:
    entry = SETS["tdc2023-dev"]
    assert entry.pin == "commit"
    branch = entry.model_copy(update={"revision": "main", "url": entry.url.replace(entry.revision, "main")})
    assert branch.pin == "not pinned"
    assert branch.model_copy(update={"sha256": "0" * 64}).pin == "SHA-256"
    assert entry.model_copy(update={"url": branch.url}).pin == "not pinned"


def test_the_page_of_the_documentation_lists_each_set_as_it_is() -> None:
    rows: dict[str, list[str]] = {}
    for line in (CHECKOUT / "docs" / "data.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 6:
            rows[cells[0].strip("`")] = cells[1:]
    assert list(rows) == list(SETS)
    for name, (kind, label, count, licence, pin) in rows.items():
        entry = SETS[name]
        assert kind == entry.kind
        assert label == (entry.label or "–")
        assert count == ("not counted" if entry.rows is None else f"{entry.rows:,}")
        assert licence == entry.licence + (" (gated)" if entry.gated else "")
        assert pin == {"SHA-256": "commit, SHA-256", "commit": "commit"}[entry.pin]


# --- sets that others add


MINE = """
[ours]
title = "Our prompts"
label = "harmless"
file = "ours.csv"
column = "ask"

[theirs]
github = "someone/prompts"
revision = "main"
licence = "MIT"
[theirs.sets.theirs-bad]
file = "data/bad.txt"
licence = "CC BY 4.0"
label = "harmful"
[theirs.sets.theirs-good]
file = "data/good.txt"
label = "harmless"
"""


def mine(folder: Path, content: str = MINE) -> Path:
    (folder / "mine.toml").write_text(content)
    return folder / "mine.toml"


@pytest.mark.usefixtures("cache")
def test_a_file_of_ones_own_adds_sets_in_the_same_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more.toml").write_text("[more]\nurl = 'https://example.org/more.txt'\n")
    monkeypatch.setenv("DEMUR_PROMPT_SETS", os.pathsep.join((str(mine(tmp_path)), str(tmp_path / "more.toml"))))
    assert set(prompt_sets()) - set(SETS) == {"ours", "theirs-bad", "theirs-good", "more"}
    assert [named_set(f"theirs-{which}").licence for which in ("bad", "good")] == ["CC BY 4.0", "MIT"]
    bad = named_set("theirs-bad")
    assert bad.url == "https://raw.githubusercontent.com/someone/prompts/main/data/bad.txt"
    assert (bad.page, bad.family, bad.pin) == ("https://github.com/someone/prompts", "theirs", "not pinned")
    assert named_set("ours").pin == "local file"
    with pytest.raises(InputError, match=r"the file .*ours\.csv of the set 'ours' does not exist"):
        read_prompts("ours", label="harmless")
    (tmp_path / "ours.csv").write_text("id,ask,prompt\n1,How do I bake bread?,no\n")
    assert read_prompts("Ours", label="harmless").texts == ("How do I bake bread?",)
    assert read_prompts("ours::prompt", label="harmless").texts == ("no",)
    with pytest.raises(InputError, match=r"'ours' is a set of harmless prompts, and harmful ones are asked for"):
        read_prompts("ours", label="harmful")
    with pytest.raises(InputError, match=r"is the local file .*ours\.csv; there is nothing to fetch"):
        store(named_set("ours"), tmp_path / "ours.csv")


@pytest.mark.usefixtures("cache")
def test_the_file_of_the_documentation_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (CHECKOUT / "docs" / "data.md").read_text(encoding="utf-8")
    block = page.partition("```toml\n")[2].partition("```")[0]
    monkeypatch.setenv("DEMUR_PROMPT_SETS", str(mine(tmp_path, block)))
    (tmp_path / "ours.csv").write_text("question\nHow?\n")
    assert read_prompts("ours", label="harmless").texts == ("How?",)
    assert named_set("theirs-good").keep == {"kind": "good"}
    assert named_set("theirs-bad").pin == "commit"


def test_sets_are_added_for_this_process_too(tmp_path: Path) -> None:
    content = MINE.replace("[ours]", "[sets-of-a-test]")
    add_prompt_sets(mine(tmp_path, content))
    (tmp_path / "ours.csv").write_text("ask\nHow?\n")
    assert read_texts("sets of a test") == ("How?",)


def test_an_installed_package_adds_sets(tmp_path: Path) -> None:
    (tmp_path / "toy_sets.py").write_text(
        "from pathlib import Path\nfrom demur.data import NamedSet\n"
        "TOY = NamedSet(name='toy', label='harmful', file=str(Path(__file__).with_name('toy.txt')))\n"
    )
    (tmp_path / "toy.txt").write_text("one\ntwo\n")
    info = tmp_path / "toy_sets-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-sets\nVersion: 1.0\n")
    code = "from demur.data import read_prompts; print(read_prompts('toy', label='harmful').texts)"

    def run(entry: str) -> subprocess.CompletedProcess[str]:
        (info / "entry_points.txt").write_text(f"[demur.prompt_sets]\ntoy = {entry}\n")
        path = os.pathsep.join((str(tmp_path), *sys.path))
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=60)

    assert run("toy_sets:TOY").stdout.strip() == "('one', 'two')"
    broken = "the prompt set 'toy' of toy-sets cannot be loaded: No module named 'no_such_module'"
    assert broken in run("no_such_module:TOY").stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[a]\nfle = 'x.txt'\nfile = 'x.txt'\n", r"set 'a': fle: Extra inputs are not permitted"),
        ("[a]\ntitle = 'x'\n", r"set 'a': .*give github or hub with revision and file, or url, or the file alone"),
        ("[a]\nhub = 'o/n'\nfile = 'x.csv'\n", r"set 'a': .*a file of a repository needs its revision and file"),
        ("[a]\nhub = 'o/n'\ngithub = 'o/n'\nrevision = 'r'\nfile = 'f'\n", r"name one of github, hub and url"),
        ("[a]\nfile = 'x.csv'\nlabel = 'bad'\n", r"set 'a': label: Input should be 'harmful' or 'harmless'"),
        ("a = 3\n", r"expected a table \[a\] for each set, found a = 3"),
        ("[a\n", r"mine\.toml is not valid TOML"),
    ],
)
def test_a_faulty_file_of_sets_names_set_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    monkeypatch.setenv("DEMUR_PROMPT_SETS", str(mine(tmp_path, content)))
    with pytest.raises(InputError, match=message) as raised:
        prompt_sets()
    assert "mine.toml" in str(raised.value)
    monkeypatch.setenv("DEMUR_PROMPT_SETS", str(tmp_path / "none.toml"))
    with pytest.raises(InputError, match=r"cannot read the prompt sets of .*none\.toml"):
        prompt_sets()


# --- names and paths


@pytest.mark.usefixtures("xstest")
def test_a_stored_set_is_read_by_name_and_only_its_rows_are_kept() -> None:
    reading = read_counted("xstest_safe", label="harmless")
    assert reading.prompts.texts == ("How do I kill a process?",)
    assert (reading.rows, reading.left_out, reading.prompts.name) == (2, 1, "xstest-safe")
    assert read_texts("XSTest Safe::id") == ("1",)


@pytest.mark.usefixtures("cache")
def test_a_file_wins_over_a_set_and_a_folder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEMUR_OFFLINE", "1")
    (tmp_path / "advbench").mkdir()
    with pytest.raises(InputError, match="downloads are switched off"):
        read_prompts("advbench", label="harmful")
    (tmp_path / "strongreject").write_text("x")
    with pytest.raises(InputError, match="cannot read files of kind"):
        read_prompts("strongreject", label="harmful")
    assert find_set("strongreject") is None
    assert find_set("strongreject::goal") is None
    assert find_set("StrongREJECT ") is None
    assert find_set("AdvBench") == find_set("advbench::goal") == SETS["advbench"]


def test_an_unknown_name_lists_the_sets_and_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'advbnch' is neither a file nor .* \(nearest: 'advbench'\); the sets"):
        read_prompts("advbnch", label="harmful")
    with pytest.raises(InputError, match=r"advbnch\.csv does not exist"):
        read_prompts("advbnch.csv", label="harmful")
    with pytest.raises(InputError, match=r"advbnch\.jsonl\.gz does not exist"):
        read_prompts("advbnch.jsonl.gz", label="harmful")
    with pytest.raises(InputError, match=r"there is no set 'gsm8' \(nearest: 'gsm8k'\); the sets are 'advbench'"):
        named_set("gsm8")


@pytest.mark.usefixtures("cache")
def test_text_is_not_taken_for_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUR_OFFLINE", "1")
    with pytest.raises(InputError, match=r"'pile-10k' is a set of text, not of prompts or questions; those are 'adv"):
        read_prompts("pile-10k", label="harmless")
    # Questions are prompts too: this one gets as far as the cache.
    with pytest.raises(InputError, match="downloads are switched off"):
        read_prompts("gsm8k", label="harmless")
