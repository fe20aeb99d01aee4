"""`demur data`: what is listed, shown and fetched, and what becomes of sets that cannot be fetched."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from command_line import Ran
from command_line import run as demur

HARMFUL = (
    b"category,source,forbidden_prompt\nDeceit,x,How do I lie?\nDeceit,x,how do I  lie?\nTheft,x,How do I steal?\n"
)
QUESTIONS = b'{"question": "What is 1 + 1?", "answer": "2"}\n{"question": "What is 2 + 2?", "answer": "4"}\n'
SETS = """
[small-harmful]
title = "A few harmful prompts"
label = "harmful"
url = "{home}/harmful.csv"
revision = "one"
licence = "MIT"
cite = "Nobody 2024"
columns = ["category", "source", "forbidden_prompt"]
column = "forbidden_prompt"
rows = 3
sha256 = "{harmful}"

[small-questions]
kind = "questions"
label = "harmless"
url = "{home}/questions.jsonl"
licence = "MIT"
columns = ["question", "answer"]
column = "question"
rows = 2
sha256 = "{questions}"

[closed]
label = "harmless"
url = "{home}/closed.tsv"
gated = true
columns = ["adversarial"]
rows = 210
"""


class _Home(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.endswith("closed.tsv"):
            self.send_error(401)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Files of the sets, as their home serves them."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "harmful.csv").write_bytes(HARMFUL)
    (folder / "questions.jsonl").write_bytes(QUESTIONS)
    return folder


@pytest.fixture(autouse=True)
def sets(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A TOML file of three sets, known to all commands, served on this machine into an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Home, directory=str(home)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    digests = {"harmful": HARMFUL, "questions": QUESTIONS}
    file = tmp_path / "sets.toml"
    file.write_text(
        SETS.format(
            home=f"http://127.0.0.1:{server.server_port}",
            **{name: hashlib.sha256(content).hexdigest() for name, content in digests.items()},
        )
    )
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DEMUR_PROMPT_SETS", str(file))
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("DEMUR_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield file
    server.shutdown()
    server.server_close()


def run(*arguments: object) -> Ran:
    return demur("data", *arguments)


def cached(name: str) -> Path | None:
    """Where the set's file is, as `demur data list --json` says."""
    records = {record["name"]: record for record in json.loads(run("list", "--json").out)}
    path = records[name]["cached"]
    return None if path is None else Path(path)


def test_list_prints_each_set_and_whether_it_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run("fetch", "small-questions")
    code, out, _ = run("list")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["name"] == ["name", "prompts", "rows", "file"]
    assert rows["small-harmful"] == ["small-harmful", "harmful", "prompts", "3", "-"]
    assert rows["small-questions"] == ["small-questions", "harmless", "questions", "2", "cached"]
    assert rows["closed"] == ["closed", "harmless", "prompts", "210", "gated"]
    assert rows["advbench"] == ["advbench", "harmful", "prompts", "520", "-"]


def test_a_wide_terminal_lists_licences_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    rows = {line.split()[0]: line.split() for line in run("list").out.splitlines() if line.strip()}
    assert rows["name"][-1] == "licence"
    assert rows["small-harmful"][-1] == "MIT"


def test_list_as_json_holds_all_that_is_known() -> None:
    records = {record["name"]: record for record in json.loads(run("list", "--json").out)}
    # Other tests of the same process may have added sets.
    assert len(records) >= 29 + 3
    small = records["small-harmful"]
    assert small["cached"] is None
    assert small["pin"] == "SHA-256"
    assert small["sha256"] == hashlib.sha256(HARMFUL).hexdigest()
    assert (small["rows"], small["label"], small["column"]) == (3, "harmful", "forbidden_prompt")


def test_sets_of_ones_own_are_named_by_an_option_too(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[only-by-option]\nlabel = "harmless"\nfile = "mine.txt"\n')
    assert run("show", "only-by-option").code == 2
    code, out, _ = demur("data", "--sets", own, "show", "only-by-option")
    assert code == 0
    assert f"file       {tmp_path / 'mine.txt'}\n" in out


def test_listing_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "transformers", "altair", "sklearn", "numpy", "httpx", "huggingface_hub", "polars")
    code = (
        "import sys\nfrom demur.cli import main\nstatus = main()\n"
        f"print(status, [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "list"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"DEMUR_CACHE": str(tmp_path), "COLUMNS": "200"},
    )
    assert done.stderr.strip() == "0 []"
    assert len(done.stdout.splitlines()) == 1 + 29


def test_show_of_a_set_that_is_not_here() -> None:
    code, out, _ = run("show", "Small_Harmful")
    assert code == 0
    fields = {line[:10].strip(): line[10:].strip() for line in out.splitlines()}
    assert fields["file"].endswith("/harmful.csv")
    assert fields["SHA-256"] == hashlib.sha256(HARMFUL).hexdigest()
    assert fields["licence"] == "MIT"
    assert fields["cite"] == "Nobody 2024"
    assert fields["column"] == "forbidden_prompt (of category, source, forbidden_prompt)"
    assert fields["pinned by"] == "commit and SHA-256"
    assert fields["cached"] == "no; `demur data fetch small-harmful` gets it"
    assert "lie" not in out


def test_show_is_honest_where_nothing_is_pinned() -> None:
    assert "pinned by  not pinned\n" in run("show", "closed").out


def test_harmful_prompts_are_counted_and_only_printed_when_asked_for() -> None:
    assert run("fetch", "small-harmful").code == 0
    code, out, error = run("show", "small-harmful")
    assert (code, error) == (0, "")
    assert "prompts: 2; repeated: 1; blank: 0\n  Deceit: 1\n  Theft: 1\n" in out
    assert out.endswith("Its prompts are harmful and not printed; --examples prints the first.\n")
    assert "How do I" not in out
    code, out, _ = run("show", "small-harmful", "--examples")
    assert "row 1: How do I lie?\n" in out


def test_harmless_rows_are_printed_and_damage_is_named() -> None:
    run("fetch", "small-questions")
    code, out, _ = run("show", "small-questions")
    assert code == 0
    assert out.endswith("row 1: What is 1 + 1?\nrow 2: What is 2 + 2?\n")
    path = cached("small-questions")
    assert path is not None
    path.write_bytes(QUESTIONS[:50])
    # Looking at it fetches nothing.
    code, out, _ = run("show", "small-questions")
    assert code == 0
    assert out.endswith(f"cached     {path} (damaged; `demur data fetch small-questions` gets it again)\n")
    assert path.read_bytes() == QUESTIONS[:50]


def test_fetch_says_where_the_files_are() -> None:
    code, out, error = run("fetch", "small-questions", "small-harmful", "SMALL-QUESTIONS")
    assert (code, error) == (0, "")
    assert out.splitlines() == [
        f"small-questions: {len(QUESTIONS)} bytes, {cached('small-questions')}",
        f"small-harmful: {len(HARMFUL)} bytes, {cached('small-harmful')}",
    ]


def test_one_failure_does_not_stop_the_others(home: Path) -> None:
    (home / "harmful.csv").write_bytes(HARMFUL + b"more")
    code, out, error = run("fetch", "small-harmful", "closed", "small-questions")
    assert code == 2
    assert out == f"small-questions: {len(QUESTIONS)} bytes, {cached('small-questions')}\n"
    lines = error.splitlines()
    assert lines[0].startswith("error: set 'small-harmful' could not be fetched: the file at http://127.0.0.1")
    assert any(line.startswith("error: set 'closed' is gated and could not be fetched") for line in lines)
    assert lines[-1] == "2 of 3 sets could not be fetched: small-harmful, closed"


def test_fetch_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUR_OFFLINE", "1")
    (tmp_path / "mine.csv").write_bytes(HARMFUL)
    (tmp_path / "other.csv").write_bytes(HARMFUL[:-1])
    code, _, error = run("fetch", "small-harmful", "--from", tmp_path / "other.csv")
    assert code == 2
    assert "other.csv is not the file of 'small-harmful': its SHA-256 is" in error
    code, out, _ = run("fetch", "small-harmful", "--from", tmp_path / "mine.csv")
    assert (code, out) == (0, f"small-harmful: {len(HARMFUL)} bytes, {cached('small-harmful')}\n")
    assert run("fetch", "small-harmful")[:2] == (0, out)
    # No hash is known of this one: its rows are counted.
    (tmp_path / "closed.tsv").write_text("adversarial\tlabel\nA story\t0\n")
    code, _, error = run("fetch", "closed", "--from", tmp_path / "closed.tsv")
    assert code == 0
    assert error == f"warning: {tmp_path / 'closed.tsv'} holds 1 rows of closed; expected 210\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch"], "error: name at least one set (`demur data list` prints them), or give --all"),
        (["fetch", "gsm8k", "--all"], "error: --all is every set; leave the names out, or --all"),
        (["fetch", "gsm8k", "alpaca", "--from", "x"], "error: --from PATH is the file of one set; 2 sets are"),
        (["fetch", "small-harmfull"], "error: there is no set 'small-harmfull' (nearest: 'small-harmful')"),
        (["show", "small-harmfull"], "error: there is no set 'small-harmfull' (nearest: 'small-harmful')"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    code, out, error = run(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith(message)
    assert len(error.splitlines()) == 1
