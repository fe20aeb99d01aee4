from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demur.data import load_prompts, make_splits
from demur.errors import InputError
from demur.types import PURPOSES, Label, Prompt, PromptSet, Splits, SplitSizes, text_key


def prompts(name: str, label: Label, texts: list[str]) -> PromptSet:
    rows = tuple(Prompt(id=f"{name}:{i}", text=text, label=label) for i, text in enumerate(texts))
    return PromptSet(name=name, prompts=rows)


def bad(n: int, start: int = 0, name: str = "bad") -> PromptSet:
    return prompts(name, "harmful", [f"harmful request {i}" for i in range(start, start + n)])


def good(n: int, start: int = 0, name: str = "good") -> PromptSet:
    return prompts(name, "harmless", [f"harmless request {i}" for i in range(start, start + n)])


def counts(splits: Splits, side: str = "harmful") -> list[int]:
    return [len(getattr(getattr(splits, purpose), side)) for purpose in PURPOSES]


def test_the_default_sizes_are_taken_where_there_is_enough() -> None:
    splits = make_splits(bad(400), good(300), sizes=SplitSizes(), seed=0)
    assert counts(splits, "harmful") == counts(splits, "harmless") == [128, 32, 32, 100]
    assert {p.label for purpose in PURPOSES for p in getattr(splits, purpose).harmful} == {"harmful"}


def test_fewer_prompts_shrink_every_split_by_its_share_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    # 100 = 8 + 4 + 4 + 4 and 80 more, shared as 120 : 28 : 28 : 96: 35.29, 8.24, 8.24, 28.24.
    with caplog.at_level(logging.WARNING, logger="demur.data"):
        splits = make_splits(bad(100), good(400), sizes=SplitSizes(), seed=0)
    assert counts(splits, "harmful") == [44, 12, 12, 32]
    assert counts(splits, "harmless") == [128, 32, 32, 100]
    shortfalls = {"direction": (128, 44), "selection": (32, 12), "tuning": (32, 12), "test": (100, 32)}
    assert list(splits.warnings) == caplog.messages
    assert list(splits.warnings) == [
        f"bad: {wanted} prompts were wanted for the {purpose} split, and there are {got}; give more prompts, or a "
        "smaller size with n"
        for purpose, (wanted, got) in shortfalls.items()
    ]


def test_the_minima_are_the_floor() -> None:
    assert counts(make_splits(bad(20), good(20), sizes=SplitSizes(), seed=0)) == [8, 4, 4, 4]
    with pytest.raises(InputError, match=r"bad has 19 prompts .* at least 20 are needed \(8 for direction, 4 for"):
        make_splits(bad(19), good(20), sizes=SplitSizes(), seed=0)
    small = SplitSizes(direction=3, selection=2, tuning=2, test=2)
    assert counts(make_splits(bad(9), good(9), sizes=small, seed=0)) == [3, 2, 2, 2]


sizes = st.builds(
    SplitSizes,
    direction=st.integers(2, 40),
    selection=st.integers(2, 20),
    tuning=st.integers(2, 20),
    test=st.integers(2, 40),
)


@given(sizes, st.integers(20, 150), st.integers(20, 150), st.integers(0, 2**31), st.randoms())
def test_splits_are_disjoint_bounded_and_independent_of_file_order(
    wanted: SplitSizes, n_bad: int, n_good: int, seed: int, shuffler: random.Random
) -> None:
    harmful, harmless = bad(n_bad), good(n_good)
    splits = make_splits(harmful, harmless, sizes=wanted, seed=seed)
    for side, given_set in (("harmful", harmful), ("harmless", harmless)):
        sets = [getattr(getattr(splits, purpose), side) for purpose in PURPOSES]
        ids = [id for part in sets for id in part.ids]
        assert len(set(ids)) == len(ids) == min(len(given_set), sum(wanted.wanted().values()))
        for part, purpose, least in zip(sets, PURPOSES, (8, 4, 4, 4), strict=True):
            assert min(least, wanted.wanted()[purpose]) <= len(part) <= wanted.wanted()[purpose]
    rows = list(harmful.prompts)
    shuffler.shuffle(rows)
    turned = PromptSet(name="bad", prompts=tuple(rows))
    assert make_splits(turned, harmless, sizes=wanted, seed=seed) == splits


def test_the_seed_decides() -> None:
    one, other = (make_splits(bad(300), good(300), sizes=SplitSizes(), seed=seed) for seed in (0, 1))
    assert one.test.harmful.ids != other.test.harmful.ids


def test_separate_test_files_stand_in_and_are_removed_from_training() -> None:
    test_bad = prompts("bench", "harmful", ["HARMFUL  request 3", "harmful request 5", *(f"new {i}" for i in range(8))])
    splits = make_splits(
        bad(40),
        good(40),
        sizes=SplitSizes(),
        seed=0,
        test_harmful=test_bad,
        test_harmless=good(20, 30, "fine"),
    )
    assert "bad: prompts taken out because bench holds them: 2 of 40" in splits.warnings
    assert "good: prompts taken out because fine holds them: 10 of 40" in splits.warnings
    assert sorted(splits.test.harmful.ids) == sorted(test_bad.ids)
    assert len(splits.test.harmless) == 20
    # 38 = 8 + 4 + 4 and 22 more, shared as 120 : 28 : 28: 15, 3.5, 3.5; the earlier of equals gets one more.
    assert counts(splits, "harmful")[:3] == [23, 8, 7]
    trained = [p for purpose in PURPOSES[:3] for p in getattr(splits, purpose).harmful]
    assert not {text_key(p.text) for p in trained} & {text_key(p.text) for p in test_bad}


def test_a_small_test_file_is_refused_and_a_large_one_is_cut() -> None:
    with pytest.raises(InputError, match=r"bench has 3 prompts .* \(4 for test\)"):
        make_splits(bad(60), good(60), sizes=SplitSizes(), seed=0, test_harmful=bad(3, 500, "bench"))
    splits = make_splits(bad(60), good(60), sizes=SplitSizes(), seed=0, test_harmful=bad(300, 500, "bench"))
    assert len(splits.test.harmful) == 100


def test_repeats_within_a_set_are_counted_once() -> None:
    doubled = prompts("bad", "harmful", [f"x {i // 2}" if i % 2 else f"X  {i // 2}" for i in range(60)])
    splits = make_splits(doubled, good(60), sizes=SplitSizes(), seed=0)
    assert splits.warnings[0] == "bad: repeated prompts, each used once: 30"
    assert sum(counts(splits)) == 30


def test_one_file_given_twice_is_refused() -> None:
    same = prompts("same", "harmless", [f"harmful request {i}" for i in range(40)])
    with pytest.raises(InputError, match=r"\(bad\) and the harmless prompts \(same\) are the same 40 prompts"):
        make_splits(bad(40), same, sizes=SplitSizes(), seed=0)


def test_prompts_on_both_sides_are_refused_wherever_they_stand() -> None:
    mixed = prompts("mixed", "harmless", ["Harmful request 7", *(f"fine {i}" for i in range(40))])
    with pytest.raises(InputError, match=r"1 prompts are both harmful \(bad\) and .* as bad:7 and mixed:0"):
        make_splits(bad(40), mixed, sizes=SplitSizes(), seed=0)
    with pytest.raises(InputError, match="2 prompts are both"):
        make_splits(bad(40), good(40), sizes=SplitSizes(), seed=0, test_harmful=good(42, 38, "t"))


@pytest.mark.parametrize("field", PURPOSES)
def test_a_split_cannot_be_empty(field: str) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        SplitSizes(**{field: 1})


# --- near-duplicates

TASKS = ("repair a lamp", "find a cheap hotel", "teach chess", "grow tomatoes", "learn the alphabet", "paint a wall")
PEOPLE = ("my grandmother", "two tired nurses", "a class of twenty", "our choir", "some new neighbours", "everybody")
PLANS = [f"Write a plan of how {people} could {task}" for task in TASKS for people in PEOPLE]


def nearly(text: str) -> str:
    """The same request in nearly the same words."""
    return text.replace("Write a", "Make a").upper() + "!!"


def test_prompts_that_are_nearly_test_prompts_choose_nothing(caplog: pytest.LogCaptureFixture) -> None:
    harmful = bad(20)
    copies = prompts("copies", "harmful", [nearly(PLANS[3]), nearly(PLANS[17])])
    both = PromptSet(name="bad", prompts=harmful.prompts + copies.prompts)
    test = prompts("bench", "harmful", [PLANS[3], PLANS[17], "Another request altogether", "And one more"])
    small = SplitSizes(direction=10, selection=4, tuning=4, test=4)
    with caplog.at_level(logging.WARNING, logger="demur.data"):
        splits = make_splits(both, good(30), sizes=small, seed=0, test_harmful=test)
    assert counts(splits) == [10, 4, 4, 4]
    chosen = splits.choosing
    ids = {id for split in (chosen.direction, chosen.selection, chosen.tuning) for id in split.harmful.ids}
    assert not ids & set(copies.ids)
    # What stays is what would have been chosen without them.
    assert splits == make_splits(harmful, good(30), sizes=small, seed=0, test_harmful=test).model_copy(
        update={"warnings": splits.warnings}
    )
    all_of_them = SplitSizes(direction=12, selection=4, tuning=4, test=4)
    splits = make_splits(both, good(30), sizes=all_of_them, seed=0, test_harmful=test)
    assert counts(splits) == [12, 4, 4, 4]
    large = all_of_them.model_copy(update={"direction": 14})
    splits = make_splits(both, good(30), sizes=large, seed=0, test_harmful=test)
    assert splits.warnings[0] == (
        "bad: prompts taken out because they are nearly prompts of the test split: 2 of 22 (the first is copies:1)"
    )
    assert splits.warnings[1].startswith("bad: 14 prompts were wanted for the direction split, and there are 12")


def test_near_duplicates_within_one_file_stay_on_one_side() -> None:
    both = prompts("bad", "harmful", [text for plan in PLANS for text in (plan, nearly(plan))])
    sizes = SplitSizes(direction=8, selection=8, tuning=8, test=10)
    splits = make_splits(both, good(100), sizes=sizes, seed=1)
    assert counts(splits) == [8, 8, 8, 10]
    test = set(splits.test.harmful.ids)
    twins = {f"bad:{int(id.partition(':')[2]) ^ 1}" for id in test} - test
    chosen = {id for purpose in PURPOSES[:3] for id in getattr(splits, purpose).harmful.ids}
    assert len(twins) > 4
    assert not chosen & twins
    assert any("nearly prompts of the test split" in warning for warning in splits.warnings)


def test_where_nearly_all_prompts_are_alike_they_stay_and_it_is_said() -> None:
    alike = prompts(
        "alike", "harmful", [f"Write a long and careful plan for the repair of lamp {i}" for i in range(60)]
    )
    splits = make_splits(alike, good(60), sizes=SplitSizes(direction=20, selection=8, tuning=8, test=20), seed=0)
    assert counts(splits) == [20, 8, 8, 20]
    first = splits.direction.harmful.ids[0]
    assert splits.warnings == (
        f"alike: 40 of 40 prompts are nearly prompts of the test split (the first is {first}), too many to take out: "
        "results on the test split say little about other prompts",
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I bake a cake?", "How do I bake a pie?"),
        ("Explain how a bill becomes a law in France", "Explain how a star becomes a red giant in space"),
        ("What is 1242 plus 7?", "What is 1242 plus 8?"),
    ],
)
def test_requests_for_other_things_are_not_duplicates(one: str, other: str) -> None:
    sizes = SplitSizes(direction=2, selection=2, tuning=2, test=2)
    given = prompts("bad", "harmful", [other, *(f"request {i}" for i in range(5))])
    test = prompts("bench", "harmful", [one, "x"])
    splits = make_splits(given, good(8), sizes=sizes, seed=0, test_harmful=test)
    assert splits.warnings == ()
    assert counts(splits) == [2, 2, 2, 2]


@pytest.mark.shared
def test_the_near_verbatim_pairs_of_advbench_and_jailbreakbench(shared: Path) -> None:
    data = shared / "data"
    splits = load_prompts(
        data / "advbench" / "harmful_behaviors.csv",
        data / "refusal_direction" / "splits" / "harmless_train.json",
        test_harmful=data / "jailbreakbench" / "harmful_behaviors.csv",
        n=SplitSizes(direction=500),
    )
    assert "harmful_behaviors: prompts taken out because harmful_behaviors holds them: 11 of 520" in splits.warnings
    # Counted by hand among the pairs with the greatest overlap.
    assert splits.warnings[1].startswith(
        "harmful_behaviors: prompts taken out because they are nearly prompts of the test split: 6 of "
    )


# --- from sources to splits


def test_prompts_are_loaded_from_sources(tmp_path: Path) -> None:
    for name, side in (("bad", bad(30)), ("good", good(30)), ("more", good(30, 100))):
        (tmp_path / f"{name}.csv").write_text("id,ask\n" + "".join(f"{p.id},{p.text}\n" for p in side))
    small = SplitSizes(direction=8, selection=4, tuning=4, test=6)
    splits = load_prompts(
        f"{tmp_path}/bad.csv::ask", [f"{tmp_path}/{name}.csv::ask" for name in ("good", "more")], n=small, seed=3
    )
    assert counts(splits) == counts(splits, "harmless") == [8, 4, 4, 6]
    assert splits.direction.harmless.name == "good+more/direction"
    apart = load_prompts(
        f"{tmp_path}/bad.csv::ask",
        f"{tmp_path}/good.csv::ask",
        test_harmless=f"{tmp_path}/more.csv::ask",
        n=small,
    )
    assert {id.partition("-")[0] for id in apart.test.harmless.ids} == {"more"}


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match=rf"the seed is {seed}; expected a whole number from 0 to 2\*\*64 - 1"):
        make_splits(bad(30), good(30), sizes=SplitSizes(), seed=seed)


def test_the_digest_of_a_set_holds_ids_texts_and_labels() -> None:
    one = prompts("a", "harmful", ["x", "y"])
    changes = [
        one.model_copy(update={"prompts": (one.prompts[0].model_copy(update=change), one.prompts[1])})
        for change in ({"id": "other"}, {"text": "z"}, {"label": "harmless"}, {"label": None})
    ]
    digests = {each.digest for each in (one, *changes)}
    assert len(digests) == 5
    assert one.model_copy(update={"name": "b"}).digest == one.digest
