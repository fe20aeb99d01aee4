from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demur.data import read_counted, read_prompts, read_table
from demur.errors import InputError
from demur.types import Label, text_key


def write(folder: Path, name: str, content: str | bytes | object) -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# --- what is read

TWO = ["How do I bake bread?", "Write a poem, please."]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", 'id,Goal\n1,How do I bake bread?\n2,"Write a poem, please."\n'),
        ("p.csv", '\ufeffgoal\r\nHow do I bake bread?\r\n"Write a poem, please."\r\n'),
        ("p.tsv", "prompt\tnote\nHow do I bake bread?\tx\nWrite a poem, please.\n"),
        ("p.txt", "How do I bake bread?\n  Write a poem, please.\r\n"),
        ("p.json", TWO),
        ("p.json", [{"instruction": text, "n": 1} for text in TWO]),
        ("p.json", {"attack": "x", "jailbreaks": [{"prompt": text, "goal": "g"} for text in TWO]}),
        ("p.json", {"Food": [TWO[0]], "Art": {"Poems:": [TWO[1]]}}),
        ("p.json", {"prompt": TWO, "target": ["a", "b"]}),
        ("p.json", {"prompts": TWO}),
        ("p.jsonl", "\n".join(json.dumps({"question": text}) for text in TWO) + "\n\n"),
        ("p.jsonl", "\n".join(json.dumps({"turns": [text, "And again."]}) for text in TWO)),
        ("P.JSONL", "\n".join(json.dumps(text) for text in TWO)),
    ],
)
def test_each_format_gives_the_same_prompts(tmp_path: Path, name: str, content: object) -> None:
    prompts = read_prompts(write(tmp_path, name, content), label="harmless")
    assert list(prompts.texts) == TWO
    assert {prompt.label for prompt in prompts} == {"harmless"}
    assert prompts.name == Path(name).stem
    assert [id.rpartition(":")[2] for id in prompts.ids] == ["0", "1"]


def test_parquet(tmp_path: Path) -> None:
    table = pl.DataFrame({"id": [1, 2], "behavior": TWO, "Category": ["food", None]})
    table.write_parquet(tmp_path / "p.parquet")
    prompts = read_prompts(tmp_path / "p.parquet", label="harmful")
    assert list(prompts.texts) == TWO
    assert [prompt.category for prompt in prompts] == ["food", None]
    write(tmp_path, "bad.parquet", b"PAR1 but no more")
    with pytest.raises(InputError, match=r"bad\.parquet is not a parquet file"):
        read_prompts(tmp_path / "bad.parquet", label="harmful")


def test_categories_are_found_and_nested_ones_joined(tmp_path: Path) -> None:
    nested = write(tmp_path, "n.json", {"Food": ["a"], "Art": {"Poems:": ["b"]}})
    assert [p.category for p in read_prompts(nested, label="harmful")] == ["Food", "Art / Poems"]
    table = write(tmp_path, "t.csv", "Behavior,FunctionalCategory,SemanticCategory\na,standard,cyber\nb,standard,\n")
    assert [p.category for p in read_prompts(table, label="harmful")] == ["cyber", None]


def test_a_column_that_first_appears_in_a_later_row_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", '{"id": 1}\n{"id": 2, "prompt": "a"}\n{"prompt": "b", "category": "art"}\n')
    reading = read_counted(path, label="harmful")
    assert [(p.text, p.category) for p in reading.prompts] == [("a", None), ("b", "art")]
    assert (reading.rows, reading.empty) == (3, 1)


def test_the_best_known_column_is_taken_and_a_named_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "jbb.csv", "Goal,Target,Behavior\nwrite a,sure a,Defamation\n")
    assert read_counted(path, label="harmful").column == "Goal"
    named = read_counted(f"{path}::behavior", label="harmful")
    assert (named.column, named.prompts.texts) == ("Behavior", ("Defamation",))


def test_files_of_one_name_do_not_share_ids(tmp_path: Path) -> None:
    ids = set()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        ids.update(read_prompts(write(tmp_path / folder, "p.txt", f"from {folder}"), label="harmful").ids)
    assert len(ids) == 2


def test_ids_are_stable_over_runs_and_places(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    one, other = write(tmp_path, "p.txt", "a\nb"), write(tmp_path / "moved", "p.txt", "a\nb")
    assert read_prompts(one, label="harmful").ids == read_prompts(other, label="harmful").ids


# --- what is dropped, and said


def test_blank_and_repeated_prompts_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "p.csv", "n,prompt\n1,One\n2,\n3,  \n4,one \n5,Two\n6,ONE\n")
    with caplog.at_level(logging.WARNING, logger="demur.data"):
        reading = read_counted(path, label="harmful")
    assert reading.prompts.texts == ("One", "Two")
    assert (reading.rows, reading.empty, reading.duplicates, reading.beyond_limit) == (6, 2, 2, 0)
    assert [id.rpartition(":")[2] for id in reading.prompts.ids] == ["0", "4"]
    assert f"{path}: 2 of 6 rows have no prompt and were dropped" in caplog.messages
    assert f"{path}: 2 of 6 rows repeat an earlier prompt and were dropped" in caplog.messages


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.sampled_from(["a", "A ", "b", "c d", "c  d", "", " "]), min_size=1, max_size=12),
    limit=st.none() | st.integers(1, 5),
)
def test_every_row_is_accounted_for(tmp_path: Path, rows: list[str], limit: int | None) -> None:
    path = write(tmp_path, "p.json", rows)
    distinct = list(dict.fromkeys(text_key(row) for row in rows if row.strip()))
    if not distinct:
        with pytest.raises(InputError, match="no usable prompt"):
            read_counted(path, label="harmful")
        return
    reading = read_counted(path, label="harmful", limit=limit)
    assert [text_key(text) for text in reading.prompts.texts] == distinct[:limit]
    dropped = reading.empty + reading.duplicates + reading.left_out + reading.beyond_limit
    assert reading.rows == len(rows) == len(reading.prompts) + dropped


# --- several sources


def test_several_sources_are_one_set_without_repeats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = write(tmp_path, "p.csv", "goal,target\na,b\nc,A\n")
    with caplog.at_level(logging.WARNING, logger="demur.data"):
        prompts = read_prompts([f"{one}::goal", f"{one}::target"], label="harmful")
    assert prompts.texts == ("a", "c", "b")
    assert [id.partition("/")[0] for id in prompts.ids] == ["1", "1", "2"]
    assert len({id.partition("/")[2] for id in prompts.ids}) == 2
    assert prompts.name == "p+p"
    assert caplog.messages == ["1 prompts stand in more than one source and are used once"]
    assert read_prompts([one], label="harmful") == read_prompts(one, label="harmful")
    with pytest.raises(InputError, match="list of sources is empty"):
        read_prompts([], label="harmful")


def test_a_file_whose_name_holds_two_colons_is_read(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "a::b.txt", "x"), label="harmful").texts == ("x",)


# --- files of both classes


@pytest.mark.parametrize(
    ("columns", "harmful", "harmless"),
    [
        ("label", ["unsafe"], ["safe"]),
        ("Label", ["harmful"], ["benign"]),
        ("is_harmful", ["True"], ["false"]),
        ("is_safe", ["0"], ["1"]),
        ("data_type", ["adversarial_harmful", "vanilla_harmful"], ["adversarial_benign", "vanilla_benign"]),
        ("prompt_harm_label", ["harmful"], ["unharmful"]),
        ("type", ["contrast_safe_targets", "contrast_discr"], ["safe_targets", "homonyms"]),
    ],
)
def test_a_labelled_file_gives_the_rows_of_the_class_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, columns: str, harmful: list[str], harmless: list[str]
) -> None:
    rows = [*((f"bad {value}", value) for value in harmful), *((f"good {value}", value) for value in harmless)]
    table = "".join(f"{text},{value}\n" for text, value in (*rows, ("nobody knows", "")))
    path = write(tmp_path, "p.csv", f"prompt,{columns}\n{table}")
    wanted: dict[Label, list[str]] = {"harmful": harmful, "harmless": harmless}
    for label, values in wanted.items():
        with caplog.at_level(logging.WARNING, logger="demur.data"):
            reading = read_counted(path, label=label)
        assert [text.split()[1] for text in reading.prompts.texts] == values
        assert reading.left_out == len(rows) + 1 - len(values)
        assert caplog.messages[-1].endswith(
            f"{reading.left_out} of {reading.rows} rows are not {label} by column {columns!r} and were left out"
        )
    assert len(read_prompts(path, label=None)) == len(rows) + 1


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("category", ["harmful", "benign"]),
        ("label", ["harmful", "poem"]),
        ("label", ["1", "0"]),
        ("topic", ["safe", "x"]),
    ],
)
def test_a_column_that_does_not_tell_the_classes_apart_leaves_nothing_out(
    tmp_path: Path, column: str, values: list[str]
) -> None:
    path = write(tmp_path, "p.csv", f"prompt,{column}\n" + "".join(f"of {value},{value}\n" for value in values))
    assert len(read_prompts(path, label="harmful")) == 2


def test_a_file_of_the_other_class_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", "prompt,label\na,safe\nb,safe\n")
    with pytest.raises(InputError, match=r"no usable prompt in 2 rows .*0 are blank, 2 of another class"):
        read_prompts(path, label="harmful")


@pytest.mark.shared
def test_real_files_of_both_classes_are_divided_as_their_authors_did(shared: Path) -> None:
    xstest = shared / "data" / "xstest"
    for path in (xstest / "xstest_prompts.csv", xstest / "completions" / "xstest_v2_completions_llama2new.csv"):
        assert len(read_prompts(path, label="harmless")) == 250
        assert len(read_prompts(path, label="harmful")) == 200
    jailbreakbench = shared / "data" / "jailbreakbench" / "jbb_harmful_and_benign.json"
    alone = shared / "data" / "jailbreakbench" / "benign_behaviors.jsonl"
    assert read_prompts(jailbreakbench, label="harmless").texts == read_prompts(alone, label="harmless").texts


# --- what is refused


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "harmful.csv", "prompt\na\n")
    with pytest.raises(InputError, match=r"harmfull\.csv does not exist \(nearest: 'harmful\.csv'\)"):
        read_prompts(tmp_path / "harmfull.csv", label="harmful")
    with pytest.raises(InputError, match="there is no folder"):
        read_prompts(tmp_path / "no" / "harmful.csv", label="harmful")


def test_a_folder_names_the_files_in_it(tmp_path: Path) -> None:
    write(tmp_path, "harmful.csv", "prompt\na\n")
    with pytest.raises(InputError, match=r"is a folder; expected a file of prompts; it holds 'harmful\.csv'"):
        read_prompts(tmp_path, label="harmful")


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("name", ["p.csv", "p.txt", "p.json", "p.jsonl"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(InputError, match=r"p\.\w+ is empty"):
        read_prompts(write(tmp_path, name, content), label="harmful")


@pytest.mark.parametrize(("name", "content"), [("p.csv", "prompt\n"), ("p.json", []), ("p.csv", "prompt,x\n,1\n")])
def test_a_file_without_prompts_is_refused(tmp_path: Path, name: str, content: object) -> None:
    with pytest.raises(InputError, match=r"p\.\w+: no"):
        read_prompts(write(tmp_path, name, content), label="harmful")


def test_a_wrong_column_names_those_there_are_and_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", "Goal,Target\na,b\n")
    with pytest.raises(InputError, match=r"no column 'gaol' \(nearest: 'Goal'\); it has 'Goal', 'Target'"):
        read_prompts(f"{path}::gaol", label="harmful")


def test_an_unknown_column_asks_for_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", "id,answerKey\n1,C\n")
    with pytest.raises(
        InputError, match=r"looks like a prompt; it has 'id', 'answerKey'\. Name the column with SOURCE::COLUMN"
    ):
        read_prompts(path, label="harmful")


def test_a_column_of_numbers_asks_for_another(tmp_path: Path) -> None:
    path = write(tmp_path, "p.json", [{"prompt": 7}])
    with pytest.raises(InputError, match=r"found 7; name the column of the text as SOURCE::COLUMN"):
        read_prompts(path, label="harmful")


@pytest.mark.parametrize(("mark", "offset"), [(b"", 18), (b"\xef\xbb\xbf", 21)])
def test_text_that_is_not_utf8_names_line_and_byte(tmp_path: Path, mark: bytes, offset: int) -> None:
    path = write(tmp_path, "p.csv", mark + "prompt\nfine\nle caf\xe9\n".encode("latin-1"))
    with pytest.raises(InputError, match=rf"p\.csv is not UTF-8: line 3, byte {offset} of the file is 0xe9"):
        read_prompts(path, label="harmful")


def test_utf16_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is UTF-16"):
        read_prompts(write(tmp_path, "p.txt", "prompt".encode("utf-16")), label="harmful")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.json",
            '[\n "a",\n "b"\n "c"]',
            r"p\.json, line 4: not JSON: Expecting ',' delimiter at column 2",
        ),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": }\n', r"p\.jsonl, line 2: not JSON"),
        ("p.json", "3", r"p\.json: expected a JSON list or object, found a number"),
        ("p.json", '["a", 3]', r"p\.json, row 1: expected a string or an object, found a number"),
        ("p.json", '{"a": ["x"], "b": null}', r"expected a list of strings under 'b', found null"),
        ("p.json", '{"a": {"b": [1]}}', r"expected a list of strings under 'a / b', found a list"),
        ("p.json", '{"prompt": ["x"], "target": []}', r"'prompt', 'target' have different lengths"),
        ("p.json", '[{"prompt": 7}]', r"row 0, column 'prompt': expected text, found 7"),
        ("p.json", '["\\ud800 x"]', r"row 0, column 'prompt': character 0 is half of a surrogate pair"),
        ("p.csv", 'prompt\n"never closed\n', r"p\.csv, line 2: unexpected end of data"),
        ("p.csv", "prompt\na, b\n", r"p\.csv, line 2: 2 cells but 1 columns; quote"),
        ("p.csv", "prompt,prompt\na,b\n", r"two columns have one name"),
        ("p.csv", 'prompt,n\n"x\ny",1\na,1,2\n', r"p\.csv, line 4: 3 cells but 2 columns; quote"),
        ("p.csv", 'prompt,n\na,1\n"b', r"p\.csv, line 3: unexpected end of data"),
        ("p.csv", 'prompt,n\n"a"b,1\n', r"p\.csv, line 2: ',' expected after '\"'"),
        ("p.csv", "prompt\na\0b\n", r"row 0, column 'prompt': character 1 is NUL"),
        ("p.txt", "fine\na\0b\n", r"row 1, column 'prompt': character 1 is NUL"),
        ("p.json", '["a\\u0000"]', r"row 0, column 'prompt': character 1 is NUL"),
        ("p.json", "[" * 100_000, r"p\.json, line 1: JSON that is nested too deeply"),
        ("p.docx", "x", r"cannot read files of kind '\.docx'; use \.csv"),
        ("prompts", "x", r"cannot read files of kind '\(none\)'"),
    ],
)
def test_malformed_files_name_the_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(write(tmp_path, name, content), label="harmful")


def test_a_pipe_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.csv")
    with pytest.raises(InputError, match=r"p\.csv is a pipe or a device.*; save its content in a file"):
        read_prompts(tmp_path / "p.csv", label="harmful")


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="limit is 0"):
        read_prompts(write(tmp_path, "p.txt", "a"), label="harmful", limit=0)


def test_absent_cells_are_none(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "p.csv", 'prompt,response\na,\nb\n"c",""\n'))
    assert [row.get("response") for row in table.rows()] == [None, None, None]
    table = read_table(write(tmp_path, "p.jsonl", '{"prompt": "a", "response": ""}\n{"prompt": "b"}\n'))
    assert [row.get("response") for row in table.rows()] == ["", None]
    assert table.columns == ("prompt", "response")


# --- real files

NO_PROMPTS = {"arc/arc_challenge_answer_keys.jsonl"}
# Rows that repeat an earlier prompt, counted apart from the reader (a counter over folded text).
REPEATED = {
    "harmbench/harmbench_behaviors_text_all.csv": 7,
    "harmbench/harmbench_behaviors_text_test.csv": 3,
    "harmbench/harmbench_behaviors_text_val.csv": 2,
    "refusal_direction/splits/harmful_test.json": 10,
    "catqa/catqa_english.json": 4,
    "gptfuzzer/GPTFuzzer.csv": 1,
    "tense_reformulation/past_tense_en.txt": 1,
    "arc/arc_challenge.jsonl": 2,
    "text_wikitext2/test.txt": 222,
}


@pytest.mark.shared
def test_every_public_file_is_read_with_its_count_of_rows(shared: Path) -> None:
    with (shared / "data" / "INDEX.tsv").open(encoding="utf-8", newline="") as file:
        index: list[dict[str, Any]] = list(csv.DictReader(file, delimiter="\t"))
    assert len(index) > 40
    for entry in index:
        path = shared / "data" / entry["file"]
        if entry["file"] in NO_PROMPTS:
            with pytest.raises(InputError, match="no column looks like a prompt"):
                read_counted(path, label=None)
            continue
        reading = read_counted(path, label=None)
        # The index counts the lines that hold text.
        assert reading.rows - reading.empty == int(entry["rows"]), entry["file"]
        assert reading.duplicates == REPEATED.get(entry["file"], 0), entry["file"]
        assert len(reading.prompts) == int(entry["rows"]) - reading.duplicates
        assert reading.empty == 0 or entry["file"] == "text_wikitext2/test.txt"
