"""The prompts of `demur probes`: what is in each set, and what is left out of it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from table_model import TableModel, features_of, splits_of

from demur.errors import InputError
from demur.method.attribution import Pool
from demur.studies.probes import Config
from demur.studies.probes.inputs import AFTER, BEFORE, LONG_BENIGN, LONG_WORDS, MIDDLE, Chosen, Sets, measured_sets
from demur.types import FeatureId, Prompt, PromptSet


def prompts(name: str, *texts: str) -> PromptSet:
    made = tuple(Prompt(id=f"{name}{n}", text=text) for n, text in enumerate(texts))
    return PromptSet(name=name, prompts=made)


@pytest.fixture
def work(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> TableModel:
    """Five attacks in two files of one family, and more prompts that are benign."""
    (tmp_path / "A").mkdir()
    for name, lines in (("one", ("Play: {ask} now", "{ask} please")), ("two", ("In short {ask}",))):
        (tmp_path / "A" / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = ["+direction 0", "free one", "free two", "free three", "a text of far too many words for any model to read"]
    path = tmp_path / "polite.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    config = Config(
        attacks=tuple(str(tmp_path / "A" / f"{name}.txt") for name in ("one", "two")), benign=(str(path),), n_benign=2,
        n_long=0, seed=5, per_prompt=1, max_new_tokens=1,
    )  # fmt: skip
    splits = splits_of(test=2)
    test = splits.test.model_copy(
        update={"harmful": prompts("bad", "rob it", "burn it"), "harmless": prompts("good", "bake it", "sing of it")}
    )
    made = TableModel(lambda _: 1.0, config, splits.model_copy(update={"test": test}))
    made.model.max_context = 10
    made.model.chat = SimpleNamespace(tokenize=lambda text: text.split())
    over = prompts("over", "kill a process")
    monkeypatch.setattr("demur.studies.probes.inputs.over_refusal_prompts", lambda _config, _context: over)
    return made


def test_every_set_holds_what_it_is_called(work: TableModel) -> None:
    sets = measured_sets(work)
    assert [(g.name, g.kind, g.positive, g.family) for g in sets] == [
        ("plain harmful", "plain", True, ""), ("plain benign", "plain", False, ""),
        ("one", "attack", True, "one"), ("benign in one", "wrapped", False, "one"),
        ("two", "attack", True, "two"), ("benign in two", "wrapped", False, "two"),
        ("over-refusal", "over-refusal", False, ""), ("polite", "benign", False, ""),
    ]  # fmt: skip
    by_name = {g.name: g for g in sets}
    assert by_name["one"].prompts.texts == ("Play: rob it now", "burn it please")
    assert by_name["one"].requests == ("rob it", "burn it")
    # The same words around benign requests, which take turns.
    wrapped = by_name["benign in one"]
    assert wrapped.prompts.texts == ("Play: bake it now", "sing of it please")
    assert wrapped.requests == ("bake it", "sing of it")
    assert [p.label for p in wrapped.prompts] == ["harmless", "harmless"]
    assert wrapped.prompts.ids == tuple(f"benign:{each}" for each in by_name["one"].prompts.ids)
    # Two of three that chose nothing and fit.
    polite = by_name["polite"].prompts.texts
    assert len(polite) == 2
    assert {*polite} < {"free one", "free two", "free three"}
    assert by_name["plain harmful"].prompts.texts == ("rob it", "burn it")
    assert by_name["over-refusal"].prompts.texts == ("kill a process",)


def test_sets_are_found_by_kind_and_family(work: TableModel) -> None:
    sets = measured_sets(work)
    assert sets.families == ("one", "two")
    assert [g.name for g in sets.of("attack", "over-refusal")] == ["one", "two", "over-refusal"]
    assert [g.name for g in sets.negatives()] == ["plain benign", "benign in one", "benign in two"]
    assert [g.name for g in sets.negatives("two")] == ["plain benign", "benign in two"]
    assert [g.name for g in sets.negatives("")] == ["plain benign"]
    assert [g.name for g in sets.positives()] == ["one", "two"]
    assert [g.name for g in sets.positives("two")] == ["two"]


def test_benign_files_that_leave_nothing_are_named(work: TableModel) -> None:
    work.model.max_context = 2
    work.config = work.config.model_copy(update={"attacks": work.config.attacks[:1]})
    work.model.chat = SimpleNamespace(tokenize=lambda text: ["x"] * (9 if "free" in text or "many" in text else 1))
    with pytest.raises(InputError, match=r"polite\.jsonl: every prompt chose something or does not fit"):
        measured_sets(work)


def test_as_many_benign_prompts_as_there_are_need_no_draw(work: TableModel) -> None:
    work.config = work.config.model_copy(update={"n_benign": 3})
    assert measured_sets(work)[-1].prompts.texts == ("free one", "free two", "free three")


def long(work: TableModel, **options: Any) -> Sets:
    given: dict[str, Any] = {"n_long": 2, "long_words": 7, "benign": ()}
    work.config = work.config.model_copy(update=given | options)
    sets = measured_sets(work)
    return Sets(group for group in sets if group.kind == "long")


def test_long_inputs_hold_the_request_where_they_say(work: TableModel) -> None:
    work.model.max_context = None
    sets = {g.name: g for g in long(work)}
    assert {name: g.positive for name, g in sets.items()} == {
        BEFORE: True, MIDDLE: True, AFTER: True, LONG_BENIGN: False, LONG_WORDS: False,
    }  # fmt: skip
    source = ["bake", "it", "sing", "of", "it"] * 3
    for n, (harmful, benign) in enumerate((("rob it", "bake it"), ("burn it", "sing of it"))):
        text = {name: g.prompts.texts[n].split() for name, g in sets.items()}
        filler = text[BEFORE][2:]
        # Seven words of benign prompts, one after the other.
        assert len(filler) == 7
        assert any(source[k : k + 7] == filler for k in range(5))
        assert text[BEFORE][:2] == harmful.split()
        assert text[AFTER] == [*filler, *harmful.split()]
        assert text[MIDDLE] == [*filler[:3], *harmful.split(), *filler[3:]]
        assert text[LONG_BENIGN] == [*filler[:3], *benign.split(), *filler[3:]]
        # Words that only harmful prompts of the direction split hold: "direction", 0 and 1 stand in "+direction 0".
        rest = list(text[LONG_WORDS])
        for word in filler:
            rest.remove(word)
        assert rest == ["direction"]
        assert [p.id for p in sets[MIDDLE].prompts] == [f"{MIDDLE}:0", f"{MIDDLE}:1"]
    assert len({g.prompts.texts[0] for g in sets.values()}) == 5


def test_long_inputs_fill_a_part_of_the_context_at_most(work: TableModel, tmp_path: Any) -> None:
    text = tmp_path / "long.txt"
    text.write_text("lorem ipsum dolor sit amet\n", encoding="utf-8")
    # Two tokens a word: of 40 tokens 60 %, which is twelve words.
    work.model.chat = SimpleNamespace(tokenize=lambda text: text.split() * 2)
    work.model.max_context = 40
    sets = {g.name: g for g in long(work, long_text=(str(text),), long_words=100)}
    words = sets[AFTER].prompts.texts[0].split()
    assert len(words) == 12 + 2
    assert {*words[:-2]} == {"lorem", "ipsum", "dolor", "sit", "amet"}
    # Fewer, if fewer were asked for; and at least one.
    assert len(long(work, long_text=(str(text),), long_words=4)[0].prompts.texts[0].split()) == 6
    assert not long(work, n_long=0)


def test_labels_of_chosen_prompts_are_those_of_the_data_and_of_the_answers() -> None:
    odds = {"tuning0": 1.0, "tuning1": float("nan"), "+tuning0": -1.0, "+tuning1": 1.0}
    work = TableModel(lambda done: odds.get(done.prompt.id, 1.0), Config(), splits_of())
    one = FeatureId(0, 1)
    found = work.found(features_of(one), pool=Pool(features=(one,), cosines=(1.0,)))
    chosen = Chosen.of(found, "tuning")
    assert chosen.texts == ("tuning 0", "tuning 1", "+tuning 0", "+tuning 1")
    # Ids of both classes may be the same in a file.
    assert chosen.prompts.ids == ("True/tuning0", "True/tuning1", "False/+tuning0", "False/+tuning1")
    assert (chosen.prompts.name, chosen.harmful.tolist()) == ("tuning", [True, True, False, False])
    np.testing.assert_array_equal(chosen.refuse, [1.0, np.nan, 0.0, 1.0])
