"""How a set's file gets into the cache: from its home, from this machine, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import threading
from pathlib import Path

import polars as pl
import pytest
from home_server import Home

from demur.data import (
    NamedSet,
    cache_path,
    fetch,
    is_intact,
    prompt_sets,
    read_counted,
    read_prompts,
    read_texts,
    store,
)
from demur.errors import InputError

CSV = b"id,prompt,label\n1,How do I kill a process?,safe\n2,How do I hurt a person?,unsafe\n"
SETS = prompt_sets()
# Of this entry only the commit is known.
TDC = SETS["tdc2023-dev"]
GATED = SETS["wildjailbreak-eval-benign"]
EVAL = b"adversarial\tlabel\tdata_type\nA story about bread\t0\tadversarial_benign\n"
EVAL_PATH = f"/datasets/{GATED.hub}/resolve/{GATED.revision}/{GATED.file}"

pytestmark = pytest.mark.usefixtures("cache")


def at_home(named: NamedSet, home: Home, content: bytes, status: int = 200) -> NamedSet:
    """The set, with the hash of `content` where it has one, fetched from the local home."""
    home.files[f"/{named.filename}"] = home.files[EVAL_PATH] = (status, content)
    sha256 = named.sha256 and hashlib.sha256(content).hexdigest()
    return named.model_copy(update={"url": f"{home.url}/{named.filename}", "sha256": sha256})


@pytest.fixture
def safe(home: Home) -> NamedSet:
    return at_home(SETS["xstest-safe"], home, CSV)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    """The user is logged in."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return "hf_secret"


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")


# --- from its home


def test_a_set_is_fetched_once(cache: Path, home: Home, safe: NamedSet) -> None:
    path = fetch(safe)
    assert [(method, where) for method, where, _ in home.asked] == [("GET", "/xstest_prompts.csv")]
    assert path == cache_path(safe)
    assert path.read_bytes() == CSV
    assert files_below(cache) == [path]
    # From here on the cache answers, for the other part of the file too.
    assert fetch(safe) == fetch(safe.model_copy(update={"name": "xstest-unsafe"})) == path
    assert len(home.asked) == 1


def test_a_set_of_the_hub_is_fetched_once(cache: Path, home: Home, token: str) -> None:
    named = at_home(GATED, home, EVAL)
    path = fetch(named)
    assert path.read_bytes() == EVAL
    assert files_below(cache) == [path]
    asked = {(method, authorization) for method, where, authorization in home.asked if where == EVAL_PATH}
    assert asked == {("HEAD", f"Bearer {token}"), ("GET", f"Bearer {token}")}
    home.asked.clear()
    assert fetch(named) == path
    assert home.asked == []


def test_only_a_gated_set_of_the_hub_is_asked_for_with_the_token(home: Home, token: str, safe: NamedSet) -> None:
    fetch(safe)
    fetch(at_home(GATED, home, EVAL).model_copy(update={"gated": False}))
    assert token
    assert {authorization for _, _, authorization in home.asked} == {None}


def test_two_processes_may_fetch_one_set(home: Home, safe: NamedSet) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(safe))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [cache_path(safe)] * 4
    assert len(home.asked) <= 4


def test_changed_bytes_are_refused_and_not_kept(cache: Path, home: Home, safe: NamedSet) -> None:
    home.files["/xstest_prompts.csv"] = (200, CSV + b"3,one more,safe\n")
    with pytest.raises(InputError, match=f"has changed: its SHA-256 is not {safe.sha256}"):
        fetch(safe)
    assert files_below(cache) == []


def test_a_download_that_breaks_off_leaves_nothing(cache: Path, home: Home, safe: NamedSet) -> None:
    home.breaks_off = True
    with pytest.raises(InputError, match=r"cannot be reached: .*IncompleteRead"):
        fetch(safe)
    assert files_below(cache) == []


def test_a_damaged_file_is_fetched_again_or_named(monkeypatch: pytest.MonkeyPatch, home: Home, safe: NamedSet) -> None:
    path = fetch(safe)
    path.write_bytes(CSV[:10])
    assert not is_intact(safe, path)
    assert fetch(safe).read_bytes() == CSV
    assert len(home.asked) == 2
    path.write_bytes(CSV[:10])
    monkeypatch.setenv("DEMUR_OFFLINE", "1")
    with pytest.raises(InputError, match=r"its file .*xstest_prompts\.csv is damaged, and downloads are switched off"):
        fetch(safe)
    assert len(home.asked) == 2


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"<!doctype html><p>Sign in</p>", "not JSON"),
        (b"[{}]", "no column 'prompt'"),
        (b'{"Food": [" "]}', "holds no row of 'tdc2023-dev'"),
        (b"", "is empty"),
    ],
)
def test_where_no_hash_is_known_the_content_is_looked_at(cache: Path, home: Home, content: bytes, why: str) -> None:
    named = at_home(TDC, home, content)
    with pytest.raises(InputError, match=f"what .*behaviors.json gave is not this set: .*{why}"):
        fetch(named)
    assert files_below(cache) == []


def test_another_number_of_rows_is_a_warning(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    named = at_home(TDC, home, b'["How is bread made?", "How is tea made?", " "]')
    with caplog.at_level(logging.WARNING, logger="demur.data"):
        fetch(named)
    assert caplog.messages == [f"{named.url} holds 2 rows of tdc2023-dev; expected 50"]


def test_rows_of_another_set_in_the_same_file_do_not_count(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    harmful = b"A plot\t1\tadversarial_harmful\n"
    named = at_home(GATED, home, EVAL + harmful)
    with caplog.at_level(logging.WARNING, logger="demur.data"):
        fetch(named)
    assert caplog.messages == [f"{named.url} holds 1 rows of {named.name}; expected 210"]
    other = at_home(SETS["wildjailbreak-eval-harmful"], home, EVAL)
    cache_path(named).unlink()
    with pytest.raises(InputError, match=r"gave is not this set: .*holds no row of 'wildjailbreak-eval-harmful'"):
        fetch(other)


def test_without_a_network_the_terms_and_the_next_step_are_given(home: Home, safe: NamedSet) -> None:
    nobody = safe.model_copy(update={"url": "http://127.0.0.1:9/xstest_prompts.csv"})
    with pytest.raises(InputError) as raised:
        fetch(nobody)
    message = str(raised.value)
    assert "cannot be reached: " in message
    assert f"Download {nobody.url} where there is a network (licence: CC BY 4.0; {safe.page})" in message
    assert "`demur data fetch xstest-safe --from xstest_prompts.csv`" in message
    home.files.clear()
    with pytest.raises(InputError, match="answered 404"):
        fetch(safe)


def test_a_hub_that_cannot_be_reached_is_known_at_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    named = at_home(GATED, home, EVAL)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    with pytest.raises(InputError, match=r"cannot be reached: .*an account that has accepted the terms is needed"):
        fetch(named)


@pytest.mark.parametrize("variable", ["DEMUR_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_mode_asks_nobody(variable: str, monkeypatch: pytest.MonkeyPatch, home: Home, safe: NamedSet) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(InputError, match=r"not in the cache, and downloads are switched off"):
        fetch(safe)
    assert home.asked == []


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe: NamedSet) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set DEMUR_CACHE to another folder"):
        fetch(safe)


# --- gated


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize("status", [401, 403])
def test_gated_without_a_token_says_where_to_accept_the_terms(home: Home, status: int) -> None:
    with pytest.raises(InputError) as raised:
        fetch(at_home(GATED, home, b"", status))
    message = str(raised.value)
    assert f"is gated and could not be fetched ({status})" in message
    assert f"accept its terms ({GATED.licence}) on {GATED.page} with your account" in message
    assert "log in here with `hf auth login` (or set HF_TOKEN)" in message
    assert "run `demur data fetch wildjailbreak-eval-benign` again" in message


@pytest.mark.parametrize(
    ("status", "step"),
    [(401, "the hub does not know the token"), (403, "the account of your token has no access: accept its terms")],
)
def test_gated_with_a_token_says_what_is_wrong_with_it(home: Home, token: str, status: int, step: str) -> None:
    with pytest.raises(InputError, match=step) as raised:
        fetch(at_home(GATED, home, b"", status))
    assert token not in str(raised.value)


def test_a_refusal_of_a_set_that_is_not_gated_is_an_answer_like_any(home: Home) -> None:
    with pytest.raises(InputError, match="answered 403"):
        fetch(at_home(SETS["xstest-safe"], home, b"", 403))


# --- from this machine


def test_a_local_file_takes_the_place_of_the_download(tmp_path: Path, home: Home, safe: NamedSet) -> None:
    (tmp_path / "any name.bin").write_bytes(CSV)
    path = store(safe, tmp_path / "any name.bin")
    assert path == cache_path(safe)
    assert fetch(safe) == path
    assert home.asked == []
    assert (tmp_path / "any name.bin").read_bytes() == CSV


def test_another_file_is_not_stored_under_the_name(tmp_path: Path, cache: Path, safe: NamedSet) -> None:
    other = tmp_path / "xstest_prompts.csv"
    other.write_bytes(CSV.replace(b"\n", b"\r\n"))
    with pytest.raises(InputError, match=rf"its SHA-256 is [0-9a-f]{{64}}, expected {safe.sha256}.*by its path in pla"):
        store(safe, other)
    with pytest.raises(InputError, match=r"nothing\.csv is not a file; expected xstest_prompts\.csv of https"):
        store(safe, tmp_path / "nothing.csv")
    (tmp_path / "tdc.csv").write_text("prompt,category\na,b\n")
    with pytest.raises(InputError, match=r"tdc\.csv is not of the format of behaviors\.json"):
        store(TDC, tmp_path / "tdc.csv")
    (tmp_path / "c4.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(InputError, match=r"c4\.json is not of the format of c4-validation.*\.json\.gz"):
        store(SETS["c4-validation"], tmp_path / "c4.json")
    assert files_below(cache) == []


# --- every set, from a file of its shape


def sample(entry: NamedSet, folder: Path) -> Path:
    """A file such as the set's home gives: two rows of the set, and one that is not of it where there are such."""
    rows = [{name: f"{name} {number}" for name in entry.columns} for number in range(3 if entry.keep else 2)]
    for column, value in entry.keep.items():
        for number, row in enumerate(rows):
            row[column] = value if number < 2 else "other"
    path = folder / entry.filename
    if path.name.endswith(".parquet"):
        pl.DataFrame(rows).write_parquet(path)
        return path
    plain = len(entry.columns) == 1
    assert entry.column is not None
    lines = {
        ".csv": [",".join(cells) for cells in (entry.columns, *(row.values() for row in rows))],
        ".tsv": ["\t".join(cells) for cells in (entry.columns, *(row.values() for row in rows))],
        ".txt": [row[entry.column] for row in rows],
        ".json": [json.dumps([row[entry.column] for row in rows] if plain else rows)],
        ".jsonl": [json.dumps(row) for row in rows],
        ".gz": [json.dumps(row) for row in rows],
    }[path.suffix]
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def toml_of(entry: NamedSet) -> str:
    """The set as a table of a user's own file."""
    keep = "".join(f'{column} = "{value}"\n' for column, value in entry.keep.items())
    given = entry.model_dump(exclude={"name", "keep", "columns", "gated"}, exclude_none=True)
    lines = [f"{key} = {json.dumps(value)}" for key, value in given.items()]
    columns = f"columns = {json.dumps(list(entry.columns))}"
    return "\n".join((f"[{entry.name}]", *lines, columns, f"[{entry.name}.keep]", keep))


@pytest.mark.parametrize("name", SETS)
def test_a_local_file_stands_in_for_every_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sample(SETS[name], tmp_path)
    digest = SETS[name].sha256 and hashlib.sha256(path.read_bytes()).hexdigest()
    entry = SETS[name].model_copy(update={"sha256": digest})
    (tmp_path / "mine.toml").write_text(toml_of(entry))
    monkeypatch.setenv("DEMUR_PROMPT_SETS", str(tmp_path / "mine.toml"))
    store(entry, path)
    expected = (f"{entry.column} 0", f"{entry.column} 1")
    assert read_texts(name) == expected
    if entry.kind != "text":
        reading = read_counted(name, label=entry.label)
        assert reading.prompts.texts == expected
        assert reading.left_out == (1 if entry.keep else 0)


# --- the real files

REAL = {
    "advbench": "advbench/harmful_behaviors.csv",
    "harmbench": "harmbench/harmbench_behaviors_text_all.csv",
    "harmbench-test": "harmbench/harmbench_behaviors_text_test.csv",
    "harmbench-val": "harmbench/harmbench_behaviors_text_val.csv",
    "strongreject": "strongreject/strongreject_dataset.csv",
    "xstest-safe": "xstest/xstest_prompts.csv",
    "xstest-unsafe": "xstest/xstest_prompts.csv",
    "gsm8k": "gsm8k/test.jsonl",
}


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_the_real_files_have_the_registered_hash_and_rows(shared: Path, name: str) -> None:
    entry = SETS[name]
    store(entry, shared / "data" / REAL[name])
    reading = read_counted(name, label=entry.label)
    assert reading.rows - reading.left_out - reading.empty == entry.rows
    assert reading.prompts.prompts[0].source == name


@pytest.mark.shared
def test_the_real_texts_of_two_sets_give_their_registered_bytes(shared: Path, tmp_path: Path) -> None:
    """These files lie here in another form, from which the home's bytes follow."""
    data = shared / "data"
    behaviours = tmp_path / "harmful-behaviors.csv"
    # The home names the first column, which is empty here.
    behaviours.write_bytes(b"Index" + (data / "jailbreakbench" / "harmful_behaviors.csv").read_bytes())
    store(SETS["jailbreakbench-harmful"], behaviours)
    rows = json.loads((data / "refusal_direction" / "processed" / "malicious_instruct.json").read_bytes())
    instructions = tmp_path / "MaliciousInstruct.txt"
    instructions.write_text("\n".join(row["instruction"] for row in rows))
    store(SETS["malicious-instruct"], instructions)
    for name in ("jailbreakbench-harmful", "malicious-instruct"):
        assert len(read_prompts(name, label="harmful")) == SETS[name].rows == 100


@pytest.mark.shared
def test_real_copies_of_other_sets_are_read_by_path_with_their_rows(shared: Path) -> None:
    data = shared / "data"
    hard = read_counted(data / "or_bench" / "or_bench_hard_1k.jsonl", label="harmless")
    assert hard.rows == SETS["or-bench-hard-1k"].rows
    assert all(prompt.category for prompt in hard.prompts)
    benign = read_counted(data / "jailbreakbench" / "benign_behaviors.jsonl", label="harmless")
    assert benign.rows == SETS["jailbreakbench-benign"].rows
    # One of the eleven categories is not in this copy.
    catqa = read_prompts(data / "catqa" / "catqa_english.json", label="harmful")
    categories = [(prompt.category or "").split(" / ") for prompt in catqa]
    assert {len(parts) for parts in categories} == {2}
    assert len({category for category, _ in categories}) == 10
    # Its lines that hold text are the rows of the registry, though its tokens are cut otherwise.
    assert len(read_texts(data / "text_wikitext2" / "test.txt")) == SETS["wikitext-2"].rows
