"""Documents of a file, read only as far as they are wanted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import polars as pl
import pytest

from demur.data import read_table, read_texts
from demur.errors import InputError

TWO = ["First document.", "Second, with a comma."]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.txt", "First document.\n\n \n  Second, with a comma.\r\n"),
        ("t.csv", 'url,Text\nx,First document.\ny,\nz,"Second, with a comma."\n'),
        ("t.tsv", "text\tprompt\nFirst document.\ta\nSecond, with a comma.\tb\n"),
        ("t.json", json.dumps(TWO)),
        ("t.json", json.dumps([{"prompt": "p", "content": text} for text in TWO])),
        ("t.json", "\n".join(json.dumps({"text": text, "url": "u"}) for text in TWO)),
        ("t.jsonl", "\n".join(json.dumps({"meta": {}, "text": text}) for text in TWO) + "\n\n"),
        ("t.jsonl", "\n".join(json.dumps({"text": text}) for text in (*TWO[:1], " ", TWO[1]))),
        # No time of writing: it would stand in the names of the tests, which all workers must agree on.
        ("t.jsonl.gz", gzip.compress("\n".join(json.dumps({"text": text}) for text in TWO).encode(), mtime=0)),
        ("t.json.gz", gzip.compress("\n".join(json.dumps({"text": text}) for text in TWO).encode(), mtime=0)),
        ("T.TXT.GZ", gzip.compress("\n".join(TWO).encode(), mtime=0)),
    ],
)
def test_each_format_gives_the_same_documents(tmp_path: Path, name: str, content: str | bytes) -> None:
    path = write(tmp_path, name, content)
    assert read_texts(path) == tuple(TWO)
    assert read_texts(path, limit=1) == tuple(TWO[:1])
    assert read_texts(str(path), limit=9) == tuple(TWO)


def test_parquet(tmp_path: Path) -> None:
    table = pl.DataFrame({"meta": [{"set": "a"}, {"set": "b"}, {"set": "c"}], "text": [TWO[0], "", TWO[1]]})
    table.write_parquet(tmp_path / "t.parquet")
    assert read_texts(tmp_path / "t.parquet") == tuple(TWO)
    assert read_texts(tmp_path / "t.parquet", limit=1) == (TWO[0],)
    with pytest.raises(InputError, match=r"row 0, column 'meta': expected text, found \{'set': 'a'\}"):
        read_texts(f"{tmp_path / 't.parquet'}::meta")


@pytest.mark.parametrize("broken", [b"PAR1 but no more", b"PAR1" + bytes(200) + b"PAR1"])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, broken: bytes) -> None:
    with pytest.raises(InputError, match=r"t\.parquet is not a parquet file that can be read"):
        read_texts(write(tmp_path, "t.parquet", broken))


def test_a_parquet_file_with_damaged_pages_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pl.DataFrame({"text": [f"document {number}" for number in range(5000)]}).write_parquet(path)
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"t\.parquet is a parquet file with damaged pages"):
        read_texts(path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.txt", "t.csv", "t.jsonl.gz"])
def test_what_stands_behind_the_limit_is_not_looked_at(tmp_path: Path, name: str) -> None:
    """The line after the second document cannot be read at all: whoever comes to it fails."""
    good = [json.dumps({"text": text}) for text in TWO] if ".json" in name else ["text", *TWO]
    content = "\n".join(good).replace(TWO[1], "Second.").encode() + b"\n\xff\xff not UTF-8, not JSON\n"
    path = write(tmp_path, name, gzip.compress(content) if name.endswith(".gz") else content)
    head = {".txt": ("text", TWO[0])}.get(path.suffix, (TWO[0], "Second."))
    assert read_texts(path, limit=2) == head
    with pytest.raises(InputError, match=rf"{name} is not UTF-8: line {len(good) + 1}, byte"):
        read_texts(path)


def test_documents_are_not_compared(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path, "t.txt", "= Career =\n= Career =\n")) == ("= Career =", "= Career =")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", "", r"t\.txt is empty"),
        ("t.jsonl", '{"text": ""}\n{"text": null}\n', r"no text in column 'text': its rows are blank"),
        ("t.jsonl", '{"text": "a"}\n[1]\n', r"t\.jsonl, row 1: expected a string or an object, found a list"),
        ("t.jsonl", '{"text": "a"}\n{"text": \n', r"t\.jsonl, line 2: not JSON"),
        ("t.jsonl", '{"text": ["a"]}\n', r"row 0, column 'text': expected text, found \['a'\]; name .* SOURCE::COLUMN"),
        ("t.jsonl", '{"id": 1}\n', r"no column looks like text; it has 'id'"),
        ("t.csv", "text\na,b\n", r"t\.csv, line 2: 2 cells but 1 columns"),
        ("t.zip", "x", r"cannot read files of kind '\.zip'"),
        ("t.gz", "x", r"cannot read files of kind '\(none\)'"),
        ("t.txt.gz", "no zip", r"t\.txt\.gz cannot be unzipped"),
    ],
)
def test_malformed_files_name_the_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_texts(write(tmp_path, name, content))


def test_a_zipped_file_that_breaks_off_is_named(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(f"line {number}" for number in range(10_000)).encode())
    path = write(tmp_path, "t.txt.gz", whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cannot be unzipped: .*; is the download complete\?"):
        read_texts(path)
    assert read_texts(path, limit=3) == ("line 0", "line 1", "line 2")


def test_a_wrong_column_and_a_limit_below_one_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "text,url\na,b\n")
    assert read_texts(f"{path}::URL") == ("b",)
    with pytest.raises(InputError, match=r"no column 'txt' \(nearest: 'text'\); it has 'text', 'url'"):
        read_texts(f"{path}::txt")
    with pytest.raises(InputError, match="limit is 0; expected at least 1 document"):
        read_texts(path, limit=0)


def test_tables_are_read_zipped_too(tmp_path: Path) -> None:
    plain = write(tmp_path, "t.csv", "prompt,n\na,1\n")
    zipped = write(tmp_path, "t.csv.gz", gzip.compress(plain.read_bytes()))
    assert list(read_table(zipped).rows()) == list(read_table(plain).rows()) == [{"prompt": "a", "n": "1"}]


@pytest.mark.shared
def test_real_documents(shared: Path) -> None:
    path = shared / "data" / "text_c4_sample" / "c4_train_sample_1k.jsonl"
    documents = read_texts(path)
    with path.open(encoding="utf-8") as file:
        expected = [json.loads(line)["text"].strip() for line in file]
    assert list(documents) == expected
    assert len(documents) == 1000
    assert read_texts(path, limit=7) == documents[:7]
