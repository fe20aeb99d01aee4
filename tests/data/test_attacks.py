"""Attack files: templates, pairs and rewrites, read as they are published."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from demur.data import Attack, AttackPair, read_attacks
from demur.errors import InputError
from demur.types import Prompt, PromptSet

PLAIN = PromptSet(name="plain", prompts=tuple(Prompt(id=f"p{n}", text=f"request {n}") for n in range(6)))


def written(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def artifact(path: Path, attack: str, *prompts: tuple[str, str | None]) -> str:
    """As JailbreakBench publishes them."""
    rows = [
        {"index": n, "goal": g, "behavior": "B", "prompt": p, "jailbroken": False} for n, (g, p) in enumerate(prompts)
    ]
    return written(path, json.dumps({"attack": attack, "model": "m", "jailbreaks": rows}))


def test_templates_of_a_csv_have_either_hole(tmp_path: Path) -> None:
    file = tmp_path / "fuzz.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows(
            [["id", "text"], [0, "Play: [INSERT PROMPT HERE]\nnow"], [1, "a {ask} b [INSERT PROMPT HERE]"]]
        )
    (attack,) = read_attacks([str(file)])
    assert attack.name == "fuzz"
    assert attack.templates == ("Play: {ask}\nnow", "a {ask} b {ask}")
    pairs = attack.on(PLAIN, 3, per_prompt=2)
    assert [pair.text for pair in pairs] == [
        "Play: request 0\nnow",
        "a request 0 b request 0",
        "Play: request 1\nnow",
    ]
    assert [pair.plain for pair in pairs] == ["request 0", "request 0", "request 1"]


def test_templates_take_turns_and_no_pair_is_made_twice() -> None:
    attack = Attack("five", templates=tuple(f"{n}: {{ask}}" for n in range(5)))
    pairs = attack.on(PLAIN, 100, per_prompt=2)
    assert len({pair.id for pair in pairs}) == len({pair.text for pair in pairs}) == len(pairs) == 12
    used = Counter(pair.text[0] for pair in pairs)
    assert len(used) == 5
    assert max(used.values()) - min(used.values()) <= 1
    assert len(attack.on(PLAIN, 100, per_prompt=9)) == 30


def test_pairs_of_an_artifact_and_what_holds_no_attack(tmp_path: Path) -> None:
    file = artifact(
        tmp_path / "gcg.json",
        "GCG",
        ("Do X", "Please do x now"),
        ("Do Y", None),
        ("Do Z", "Do Z"),
        ("Do V", "Other words"),
    )
    (attack,) = read_attacks([file])
    assert attack.name == "GCG/m"
    assert attack.empty == 2
    assert [(pair.id, pair.plain, pair.text) for pair in attack.pairs] == [
        ("GCG/m:0", "Do X", "Please do x now"),
        ("GCG/m:3", "Do V", "Other words"),
    ]
    inside, outside = attack.pairs
    assert inside.around == ("Please ", " now")
    assert inside.with_request("sing") == "Please sing now"
    assert outside.around is None
    with pytest.raises(ValueError, match="GCG/m:3"):
        outside.with_request("sing")
    assert attack.on(PLAIN, 1, seed=3) == attack.on(PLAIN, 1, seed=3)
    assert set(attack.on(PLAIN, 9)) == set(attack.pairs)


def test_lists_of_rewrites_have_no_plain_version(tmp_path: Path) -> None:
    (attack,) = read_attacks([written(tmp_path / "past.txt", "How was X done?\nHow was Y done?\nHow was X done?\n")])
    assert attack.pairs == (
        AttackPair(id="past:0", attack="past", plain=None, text="How was X done?"),
        AttackPair(id="past:1", attack="past", plain=None, text="How was Y done?"),
    )
    assert attack.empty == 1


def test_a_column_may_be_named(tmp_path: Path) -> None:
    file = written(tmp_path / "wild.csv", "vanilla,adversarial,odd\nDo X,Novel: do X,Poem: do X\n")
    assert read_attacks([file])[0].pairs[0].text == "Novel: do X"
    assert read_attacks([f"{file}::odd"])[0].pairs[0].text == "Poem: do X"


def test_names_tell_files_apart(tmp_path: Path) -> None:
    files = [written(tmp_path / folder / "list.txt", "{ask} now") for folder in ("a", "b")]
    assert [attack.name for attack in read_attacks(files)] == ["a/list", "b/list"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("t.csv", "id,text\n0,Say {ask}\n1,Say nothing\n", r"t\.csv, row 1, column 'text': no hole .*\{ask\}"),
        ("n.jsonl", '{"goal": "Do X", "prompt": 3}\n', r"n\.jsonl, row 0, column 'prompt': expected text, found 3"),
        ("e.csv", "goal,prompt\nDo X,Do X\n", r"e\.csv: no attack in the column 'prompt' beside 'goal'.*--attacks"),
        ("c.csv", "id,note\n1,2\n", r"c\.csv: no column looks like .*--attacks FILE::COLUMN"),
    ],
)
def test_errors_name_file_and_row(tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_attacks([written(tmp_path / name, text)])


def test_files_that_are_not_there_or_named_twice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_attacks([str(tmp_path / "none.json")])
    file = written(tmp_path / "a.txt", "{ask} now")
    with pytest.raises(InputError, match="twice"):
        read_attacks([file, file])


@pytest.mark.shared
def test_published_files_are_read_as_they_are(shared: Path) -> None:
    data = shared / "data"
    fuzzer, past, gcg, search = read_attacks(
        [
            str(data / file)
            for file in (
                "gptfuzzer/GPTFuzzer.csv",
                "tense_reformulation/past_tense_en.txt",
                "jbb_artifacts/GCG/transfer/gpt-3.5-turbo-1106.json",
                "jbb_artifacts/prompt_with_random_search/black_box/gpt-4-0125-preview.json",
            )
        ]
    )
    assert len(fuzzer.templates) == 77
    assert len(past.pairs) + past.empty == 730
    assert not any(pair.plain for pair in past.pairs)
    assert (gcg.name, len(gcg.pairs)) == ("GCG/gpt-3.5-turbo-1106", 100)
    assert search.name == "prompt_with_random_search/gpt-4-0125-preview"
    # Those attacks write the request in small letters.
    assert sum(pair.around is not None for pair in search.pairs) > 50
