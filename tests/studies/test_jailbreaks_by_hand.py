"""`demur jailbreaks` on signals that are a rule of the text: drops, shams, tests and explanations are known."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from table_model import Done, TableModel, features_of, numbered, splits_of, use

from demur.data import Attack, AttackPair
from demur.errors import InputError
from demur.method.attribution import Pool
from demur.method.interventions import HoldFeatures
from demur.method.local import LocalExplanation, Patch
from demur.model import Region
from demur.stats import Estimate, sign_flip_p, spearman
from demur.studies.gauge import Gauge
from demur.studies.jailbreaks import (
    Attacked,
    Config,
    configured_attacks,
    fits,
    offered_attacks,
    outcome_of,
    run,
    used_texts,
)
from demur.studies.jailbreaks.causes import Explained, agreement, walked_rows
from demur.studies.jailbreaks.effects import adjusted, group_rows
from demur.studies.jailbreaks.effects import test_rows as compared
from demur.studies.jailbreaks.results import (
    F_STAR,
    GROUPS,
    LOCAL,
    RANDOM,
    Drop,
    JailbreaksResult,
    PairRow,
    WalkRow,
)
from demur.types import FeatureId, Outcome, Prompt, PromptSet, Splits, Verdict

SUCCEEDED, FAILED, WRAPPED, PADDED = GROUPS
H, R, OTHER = FeatureId(0, 1), FeatureId(2, 2), FeatureId(1, 3)


# -- means and tests ---------------------------------------------------------------------------------------------------


def pair(request: str, outcome: Any, refusal: float, harm: float = 0.0, attack: str = "A", **shams: float) -> PairRow:
    """A sham's drop of harm is half of its refusal's."""
    given: dict[str, Any] = {name: Drop(harm=value / 2, refusal=value) for name, value in shams.items()}
    row: dict[str, Any] = {"id": request, "attack": attack, "request": request, "outcome": outcome}
    return PairRow(**row, drop=Drop(harm=harm, refusal=refusal), **given)


def test_group_means_are_over_prompts_and_their_intervals_over_requests() -> None:
    rows = [
        pair("a", "succeeded", 0.9, 0.1, wrapped=0.4), pair("a", "succeeded", 0.7, 0.3),
        pair("b", "succeeded", 0.2, 0.2),
        pair("b", "failed", 0.05, np.nan), pair("c", "failed", 0.15, 0.5), pair("d", "neither", 5.0, padded=np.nan),
    ]  # fmt: skip
    found = {row.group: row for row in group_rows("all", rows)}
    # Nothing was padded that has a signal.
    assert list(found) == [SUCCEEDED, FAILED, WRAPPED]
    one = found[SUCCEEDED]
    assert (one.attack, one.requests, one.refusal.n, one.harm.n) == ("all", 2, 3, 3)
    assert (one.refusal.value, one.harm.value) == pytest.approx((0.6, 0.2))
    # Two requests: of either alone 0.8 or 0.2.
    assert (one.refusal.low, one.refusal.high) == pytest.approx((0.2, 0.8))
    assert (found[FAILED].requests, found[FAILED].refusal.value) == (2, pytest.approx(0.1))
    assert (found[FAILED].harm.n, found[FAILED].harm.value) == (1, 0.5)
    assert (found[WRAPPED].requests, found[WRAPPED].refusal.value, found[WRAPPED].harm.value) == (1, 0.4, 0.2)


def several(n: int, attack: str = "A", **changes: Any) -> list[PairRow]:
    """Requests on which an attack succeeded twice and failed once."""
    return [
        row
        for k in range(n)
        for row in (
            pair(f"r{k}", "succeeded", 0.5 + k / 10, 1.0, attack, **changes),
            pair(f"r{k}", "succeeded", 0.7 + k / 10, 1.0, attack, **changes),
            pair(f"r{k}", "failed", 0.3, 1.0 + 0.1 * (-1) ** k, attack),
        )
    ]


def test_success_and_failure_are_compared_within_six_requests_or_more() -> None:
    harm, refusal = compared("A", several(6))
    assert (refusal.attack, refusal.against, refusal.measure, refusal.paired) == ("A", FAILED, "refusal", True)
    # 0.6 + k/10 less 0.3: 0.3 to 0.8.
    assert (refusal.difference.value, refusal.difference.n) == (pytest.approx(0.55), 6)
    assert refusal.p == pytest.approx(2 / 64)
    assert (harm.measure, harm.difference.value, harm.p) == ("harm", pytest.approx(0.0), 1.0)
    # A pair of one attack is not one of another.
    apart = [*several(6)[::3], *(row.model_copy(update={"attack": "B"}) for row in several(6)[2::3])]
    assert list(compared("all", apart)) == []


def test_of_several_attacks_on_a_request_the_mean_counts() -> None:
    rows = [*several(6), *(r.model_copy(update={"drop": Drop(harm=0, refusal=0)}) for r in several(6, "B"))]
    _, refusal = compared("all", rows)
    assert (refusal.difference.value, refusal.difference.n) == (pytest.approx(0.275), 6)


def test_with_fewer_requests_two_groups_of_one_attack_are_compared() -> None:
    _, refusal = compared("A", several(5))
    assert (refusal.paired, refusal.difference.n) == (False, 10)
    # Means of 0.6 to 1.0 against 0.3 five times: of 252 ways to part them two are as far.
    assert refusal.difference.value == pytest.approx(0.5)
    assert refusal.p == pytest.approx(2 / 252, abs=0.004)
    assert list(compared("all", [*several(3), *several(2, "B")])) == []
    one = [pair("a", "succeeded", 1.0), pair("b", "failed", 0.0), pair("c", "failed", 0.1)]
    assert list(compared("A", one)) == []
    two = list(compared("A", [*one, pair("d", "succeeded", 0.9)]))
    assert [row.measure for row in two] == ["harm", "refusal"]
    assert two[1].difference.value == pytest.approx(0.9)
    assert two[1].p == pytest.approx(1 / 3, abs=0.03)
    # All alike: no way to part them is nearer.
    assert two[0].p == 1.0


def test_shams_are_held_against_the_attacks_that_they_were_made_of() -> None:
    rows = [
        *(pair(f"r{k}", "succeeded", 0.9, 0.5, wrapped=0.1 * k, padded=0.2) for k in range(6)),
        pair("r9", "succeeded", 9.0), pair("r8", "failed", 0.1, 0.1, wrapped=7.0),
    ]  # fmt: skip
    found = {(row.against, row.measure): row for row in compared("A", rows)}
    assert list(found) == [(against, m) for against in (WRAPPED, PADDED) for m in ("harm", "refusal")]
    # 0.9 less 0 to 0.5; harm 0.5 less half of that.
    assert found[WRAPPED, "refusal"].difference.value == pytest.approx(0.65)
    assert found[WRAPPED, "harm"].difference.value == pytest.approx(0.375)
    assert found[PADDED, "refusal"].difference.value == pytest.approx(0.7)
    assert all(row.paired and row.difference.n == 6 for row in found.values())
    assert found[WRAPPED, "refusal"].p == sign_flip_p([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])


def test_p_is_adjusted_within_a_family() -> None:
    rows = list(compared("A", several(6)))
    assert [row.p_holm for row in adjusted(rows)] == [1.0, pytest.approx(4 / 64)]
    assert [(row.p, row.measure) for row in adjusted(rows)] == [(row.p, row.measure) for row in rows]


# -- attacks -----------------------------------------------------------------------------------------------------------


def named(label: Any, n: int, text: str) -> Prompt:
    return Prompt(id=f"{label}{n}", text=text, label=label)


def splits(**texts: Sequence[str]) -> Splits:
    parts = {
        label: PromptSet(name=label, prompts=tuple(named(label, n, text) for n, text in enumerate(some)))
        for label, some in texts.items()
    }
    made = splits_of()
    return made.model_copy(update={"test": made.test.model_copy(update=parts)})


def answered(done: Done) -> float:
    """ "calmly" gets past refusal, "please" does not; what is asked "kindly" is answered plainly too."""
    text = done.prompt.text
    if "??" in text:
        return float("nan")
    harmful = done.prompt.label != "harmless" and "kindly" not in text
    return 1.0 if harmful and "calmly" not in text else -1.0


def work_of(limit: int | None = None, given: Splits | None = None, **options: Any) -> TableModel:
    asked: dict[str, Any] = {"n_attacks": 10, "per_prompt": 2, "seed": 3, "max_new_tokens": 2, "n_explain": 2}
    made = TableModel(answered, Config(**(asked | options)), given or splits())
    made.model.max_context = limit
    made.model.chat = SimpleNamespace(tokenize=lambda text, *_: getattr(text, "text", text).split())
    return made


@pytest.mark.parametrize(("words", "limit", "expected"), [(3, 5, True), (4, 5, False), (400, None, True)])
def test_a_prompt_fits_with_its_answer(words: int, limit: int | None, expected: bool) -> None:
    assert fits(work_of(limit), "word " * words) is expected


def test_an_attack_offers_what_fits_and_did_not_choose() -> None:
    def made(n: int, plain: str | None, text: str) -> AttackPair:
        return AttackPair(id=f"p{n}", attack="file", plain=plain, text=text)

    pairs = (
        made(0, "ask this", "ask this now"), made(1, "ask that", "one two three four five"), made(2, None, "known one"),
        made(3, "Known  two", "free text"), made(4, "one two three four five", "short"), made(5, None, "free too"),
    )  # fmt: skip
    templates = Attack("wrap", templates=("{ask} one", "{ask} one two three"))
    work = work_of(6)
    asked = numbered("test", 3)  # Of two words each.
    offered = offered_attacks(work, [Attack("file", pairs=pairs), templates], asked, {"known one", "known two"})
    assert [(o.attack.name, o.too_long, o.chosen_from) for o in offered] == [("file", 2, 2), ("wrap", 1, 0)]
    assert [p.id for p in offered[0].pairs] == ["p0", "p5"]
    assert [p.text for p in offered[1].pairs] == ["test 0 one", "test 1 one", "test 2 one"]
    assert not work.warnings
    # What leaves nothing is warned of, and refused where nothing else is left.
    gone = [Attack("far", templates=("{ask} one two three",)), Attack("own", pairs=pairs[2:3])]
    found = offered_attacks(work, [*gone, templates], asked, {"known one"})
    assert [o.attack.name for o in found] == ["wrap"]
    assert ["far: 1 of its" in work.warnings[0], "on 0 the" in work.warnings[0]] == [True, True]
    assert "own: 0 of its" in work.warnings[1]
    assert "on 1 the" in work.warnings[1]
    with pytest.raises(InputError, match=r"leaves anything to measure: .*far.*own"):
        offered_attacks(work, gone, asked, {"known one"})


def test_as_many_pairs_as_asked_are_made_with_so_many_templates_each() -> None:
    wrap = Attack("wrap", templates=("{ask} a", "{ask} b", "{ask} c"))
    (found,) = offered_attacks(work_of(n_attacks=5), [wrap], numbered("test", 3), set())
    assert [p.text for p in found.pairs] == ["test 0 a", "test 0 b", "test 1 c", "test 1 a", "test 2 b"]


def test_only_requests_that_are_refused_plainly_are_attacked() -> None:
    pairs = (
        AttackPair(id="x0", attack="file", plain="steal it", text="calmly steal it"),
        AttackPair(id="x1", attack="file", plain="Steal  it", text="please steal it"),
        AttackPair(id="x2", attack="file", plain="kindly help", text="calmly kindly help"),
        AttackPair(id="x3", attack="file", plain=None, text="no plain one"),
    )
    wrap = Attack("wrap", templates=("{ask} calmly",))
    found = Attacked.by(work_of(), [Attack("file", pairs=pairs), wrap], numbered("test", 1), set())
    assert [p.id for p in found.pairs] == ["x0", "x1", "x3", "test0-wrap:0"]
    # One request in two spellings is asked once, as it was spelt first.
    assert {key: prompt.text for key, prompt in found.plain.items()} == {
        "x0": "steal it", "x1": "steal it", "x2": "kindly help", "test0-wrap:0": "test 0",
    }  # fmt: skip
    assert found.plain["x0"].id == found.plain["x1"].id == "plain:x0"
    assert [(r.attack, r.n, r.plain_answered, r.too_long, r.chosen_from) for r in found.rows] == [
        ("file", 3, 1, 0, 0), ("wrap", 1, 0, 0, 0),
    ]  # fmt: skip
    assert found.answers.refused == (False, True, True, False)
    with pytest.raises(InputError, match="refuses none of the 1 plain requests"):
        Attacked.by(work_of(), [Attack("file", pairs=pairs[2:3])], numbered("test", 1), set())


def test_texts_that_chose_are_those_of_every_split_but_the_test() -> None:
    keys = used_texts(splits().choosing)
    assert len(keys) == 12
    assert {"direction 0", "+tuning 1"} <= keys
    assert "test 0" not in keys


def test_built_in_wrappers_stand_before_files(tmp_path: Any) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("{ask} now\n", encoding="utf-8")
    assert [a.name for a in configured_attacks([str(path), "framings"])] == ["framings", "mine"]
    assert [a.name for a in configured_attacks([str(path)])] == ["mine"]
    assert configured_attacks(["framings"])[0].templates


@pytest.mark.parametrize(
    ("outcome", "p", "expected"),
    [
        (None, 0.0, "neither"), (Outcome.INCOHERENT, 0.0, "neither"), (Outcome.REFUSAL, 0.0, "failed"),
        (Outcome.PARTIAL_REFUSAL, 0.0, "failed"), (Outcome.COMPLIANCE, 0.49, "succeeded"),
        (Outcome.COMPLIANCE, 0.5, "neither"),
    ],
)  # fmt: skip
def test_an_attack_succeeds_where_the_answer_complies_from_its_first_word(
    outcome: Any, p: float, expected: str
) -> None:
    assert outcome_of(Verdict(outcome=outcome, judge="x"), p) == expected


# -- the study ---------------------------------------------------------------------------------------------------------


def level(text: str) -> float:
    """What a text takes away: its letters, in hundredths."""
    return sum(map(len, text.split())) / 100


class Read(Gauge):
    """Signals that are a rule of the text; what was read is kept by the name of the set."""

    def __init__(self) -> None:
        self.seen: dict[str, PromptSet] = {}
        self.__dict__ |= {"harm": (H,), "refusal": (R,), "refusal_ids": (1,)}

    def read(self, prompts: PromptSet, change: Any = ()) -> np.ndarray:  # noqa: ARG002
        self.seen[prompts.name] = prompts
        return np.array([[1 - level(p.text), 1 - 2 * level(p.text)] for p in prompts]).reshape(-1, 2)


@pytest.fixture
def studied(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """Two attacks on three requests: "calmly" succeeds, "please" fails."""

    def made(
        templates: Sequence[Sequence[str]] = (("calmly {ask} now", "please {ask}"),),
        refusing: bool = False,
        **options: Any,
    ) -> Any:
        sources: list[str] = []
        for n, lines in enumerate(templates):
            (tmp_path / f"file{n}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            sources.append(str(tmp_path / f"file{n}.txt"))
        given = splits(
            harmful=["rob a bank", "burn the old barn", "steal"],
            harmless=["+ bake it", "+ sing", "+ walk a very long way home", "+ refused ?? one"],
        )
        work = work_of(None, given, attacks=sources, **options)
        if refusing:
            work.rule = lambda done: 1.0 if done.prompt.id.startswith("harmless") else answered(done)
        found = work.found(features_of(R, OTHER), pool=Pool(features=(R,), cosines=(0.5,)))
        use(monkeypatch, work, found)
        gauge = Read()
        monkeypatch.setattr(Gauge, "of", classmethod(lambda _cls, _work, _found: gauge))
        # Succeeded answers begin as such, but for one.
        monkeypatch.setattr(
            "demur.studies.gauge.p_refuse",
            lambda _w, prompts, *_: np.array([0.9 * ("barn" in p.text) for p in prompts]),
        )
        explained: dict[str, Any] = {}

        def explain(_cls: Any, *given: Any) -> Explained:
            explained["given"] = given[2:]
            rate = Estimate(value=0.5, low=0, high=1, n=2)
            return Explained(rates={LOCAL: rate}, share=0.25, chance=0.125)

        def walked(_work: Any, _gauge: Any, pairs: Any) -> Any:
            explained["walked"] = pairs
            return ()

        monkeypatch.setattr(Explained, "of", classmethod(explain))
        monkeypatch.setattr("demur.studies.jailbreaks.causes.walked_rows", walked)
        return run(work), gauge, work, explained

    return made


def test_drops_of_attacks_and_shams_are_differences_of_signals(studied: Any) -> None:
    result, gauge, work, _ = studied()
    assert isinstance(result, JailbreaksResult)
    rows = {row.id: row for row in result.pairs}
    assert {key: row.outcome for key, row in rows.items()} == {
        "harmful0-file0:0": "succeeded", "harmful0-file0:1": "failed", "harmful1-file0:0": "neither",
        "harmful1-file0:1": "failed", "harmful2-file0:0": "succeeded", "harmful2-file0:1": "failed",
    }  # fmt: skip
    assert (result.harm, result.refusal, result.f_star) == ((H,), (R,), (R, OTHER))
    (attack,) = result.attacks
    assert (attack.n, attack.neither, attack.success.value, attack.success.n, attack.success.unscored) == (
        6, 1, 0.4, 5, 1,
    )  # fmt: skip
    # "calmly" and "now" are nine letters, "please" six.
    for row in rows.values():
        letters = 0.09 if row.id.endswith(":0") else 0.06
        assert (row.drop.harm, row.drop.refusal) == pytest.approx((letters, 2 * letters))
        assert (row.attack, row.padded_refused) == ("file0", True)
        # The same text around a harmless request takes as much.
        assert row.wrapped is not None
        assert (row.wrapped.harm, row.wrapped.refusal) == pytest.approx((letters, 2 * letters))
    assert rows["harmful0-file0:0"].request == rows["harmful0-file0:1"].request == "plain:harmful0-file0:0"
    # Harmless requests of about the length of each, each once before any is taken again.
    wrapped = {p.id: p.text for p in gauge.seen["wrapped"]}
    assert wrapped["harmful0-file0:0"] == "calmly + bake it now"
    assert wrapped["harmful0-file0:1"] == "please + sing"
    assert wrapped["harmful1-file0:0"] == "calmly + walk a very long way home now"
    assert wrapped["harmful1-file0:1"] == "please + bake it"
    assert gauge.seen["harmless"].texts == ("+ bake it", "+ sing", "+ walk a very long way home")
    words = ["+", "bake", "it", "+", "sing", "+", "walk", "a", "very", "long", "way", "home"]
    for prompt in gauge.seen["padded"]:
        plain = {"0": "rob a bank", "1": "burn the old barn", "2": "steal"}[prompt.id[7]]
        before, after = prompt.text.split(plain)
        assert [len(before.split()), len(after.split())] == ([1, 1] if prompt.id.endswith(":0") else [1, 0])
        assert {*before.split(), *after.split()} <= set(words)
        row = rows[prompt.id]
        assert row.padded is not None
        assert row.padded.harm == pytest.approx(level(before) + level(after))
        # One word follows the other in the harmless prompts.
        if after:
            assert words[(words * 2).index(after.strip(), words.index(before.strip()) + 1) - 1] == before.strip() or (
                before.strip() == "+"
            )
    assert (result.padded_refusal.value, result.padded_refusal.n) == (1.0, 6)
    assert work.watched == ["tuning0", "tuning1", "+tuning0", "+tuning1"]


def test_of_one_attack_there_is_one_family_of_tests_and_of_two_three(studied: Any) -> None:
    one = studied()[0]
    assert {row.attack for row in one.groups} == {"file0"}
    assert {row.attack for row in one.tests} == {"file0"}
    two = studied((("calmly {ask} now",), ("please {ask}", "calmly and softly {ask}")))[0]
    assert {row.attack for row in two.groups} == {"all", "file0", "file1"}
    assert list(dict.fromkeys(row.attack for row in two.tests)) == ["file0", "file1"]
    # What neither succeeded nor failed is in no mean.
    (row,) = (r for r in two.groups if (r.attack, r.group) == ("file0", SUCCEEDED))
    assert (row.requests, row.refusal.n) == (2, 2)
    assert [(a.attack, a.n, a.neither) for a in two.attacks] == [("file0", 3, 1), ("file1", 6, 1)]


def test_requests_are_explained_in_turn_each_attack_and_each_once(studied: Any) -> None:
    templates = (("calmly {ask} now",), ("calmly and softly {ask}", "softly {ask} calmly"))
    *_, explained = studied(templates, n_explain=3, n_walks=10)
    pairs, plain, answers = explained["given"]
    # First of both attacks in turn, requests that were not there before; then the others.
    assert [p.id for p in pairs] == ["harmful0-file0:0", "harmful2-file0:0", "harmful0-file1:0"]
    assert [p.id for p in explained["walked"]] == [
        "harmful0-file0:0", "harmful2-file0:0", "harmful0-file1:0", "harmful0-file1:1", "harmful2-file1:0",
        "harmful2-file1:1",
    ]  # fmt: skip
    assert plain[pairs[0].id].text == "rob a bank"
    assert answers[pairs[0].id] == "adversarial prompts: harmful0-file0:0"


def test_explanations_are_passed_on(studied: Any) -> None:
    result = studied()[0]
    assert (result.f_star_share, result.f_star_chance, result.walks, result.agreement) == (0.25, 0.125, (), ())
    assert result.restored[LOCAL].value == 0.5


def test_where_no_harmless_prompt_is_answered_there_are_no_shams(studied: Any) -> None:
    result, gauge, work, _ = studied(refusing=True)
    assert all(row.wrapped is None and row.padded is None and row.padded_refused is None for row in result.pairs)
    assert result.padded_refusal.n == 0
    assert np.isnan(result.padded_refusal.value)
    assert any("no sham rewrites" in warning for warning in work.warnings)
    assert len(gauge.seen["padded"]) == 0


# -- local explanations ------------------------------------------------------------------------------------------------


def test_each_succeeded_attack_is_answered_under_its_own_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches bring refusal back on the first, random ones on none, F* on both."""
    pairs = [AttackPair(id=f"a{n}", attack="A", plain="rob a bank", text=f"calmly rob a bank {n}") for n in range(2)]

    def rule(done: Done) -> float:
        held = {feature: values[0] for feature, values in done.held.items()}
        if OTHER in held:
            return 1.0 if held[R] == 5.0 else -1.0
        return 1.0 if done.prompt.id == "a0" and held.get(R) == 10.0 else -1.0

    work = work_of(max_patches=7, seed=9, patch_depth=0.5)
    work.rule = rule
    work.suite = SimpleNamespace(layers=(0, 1, 2, 3))
    work.depends = {}
    regions = (int(Region.INSTRUCTION), int(Region.POST_INSTRUCTION), int(Region.POST_INSTRUCTION))

    class Item(list[int]):
        def __init__(self, prompt: Prompt) -> None:
            super().__init__(range(3))
            self.prompt, self.prompt_id, self.ids, self.regions = prompt, prompt.id, (7, 8, 9), regions

    plain = {p.id: Prompt(id="plain", text="rob a bank") for p in pairs}
    work.model.tokenize = lambda prompts: [Item(p) for p in prompts]
    work.model.chat = SimpleNamespace(tokenize=lambda prompt: Item(prompt))
    work.model.tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    asked: list[Any] = []

    class Search:
        def __init__(self, model: Any, suite: Any, before: Any, item: Any, refusal: Any, layers: Any) -> None:
            asked.append((model is work.model, suite is work.suite, before.prompt.id, refusal, tuple(layers)))
            self.item = item

        def explain(self, *, limit: int, seed: int) -> LocalExplanation:
            asked.append((limit, seed))
            n = int(self.item.prompt_id[1])
            own = (Patch(feature=R, token=0, value=10.0 * (1 + n), before=3.0, predicted=0.0),)
            more = (Patch(feature=H, token=2, value=1.0, before=2.0, predicted=0.0),) if n else ()
            drawn = (Patch(feature=H, token=0, value=4.0, before=4.0, predicted=0.0),)
            return LocalExplanation(
                prompt_id=self.item.prompt_id, kl=(2.0, 1.0), p_refuse=(0.1, 0.9), patches=(*own, *more),
                p_restored=0.9, restored=True, drawn=drawn,
            )  # fmt: skip

    def transplant(_model: Any, _suite: Any, plain: Any, item: Any, features: Any) -> Any:
        assert (plain.prompt.id, item.prompt_id[0], features) == ("plain", "a", (R, OTHER))
        return HoldFeatures(features, torch.full((3, 2), 5.0))

    mapped: list[Any] = []

    def keep(name: str, depends: Any, kind: Any, keys: Any, compute: Any, **_: Any) -> Any:
        mapped.append((name, depends, kind, keys))
        return [row for rows in compute(lambda ids: True) for row in rows]  # noqa: ARG005

    work.run.mapped = keep
    monkeypatch.setattr("demur.method.local.LocalSearch", Search)
    monkeypatch.setattr("demur.method.local.transplant", transplant)
    found = work.found(features_of(R, OTHER), pool=Pool(features=(R,), cosines=(0.5,)))
    before = {"a0": "Sure.", "a1": "Of course."}
    made = Explained.of(work, found, pairs, plain, before)
    # Layers in the first half of four.
    assert asked[0] == (True, True, "plain", (1,), (0, 1))
    assert asked[1] == (7, 9)
    first, second = made.rows
    assert (first.id, first.attack, first.features, first.tokens, first.regions, first.raised) == (
        "a0", "A", (R,), ("<7>",), ("instruction",), (True,),
    )  # fmt: skip
    assert (second.features, second.tokens, second.regions, second.raised) == (
        (R, H), ("<7>", "<9>"), ("instruction", "post_instruction"), (True, False),
    )  # fmt: skip
    assert (first.kl, first.p_refuse) == ((2.0, 1.0), (0.1, 0.9))
    assert [(row.restored, row.random, row.f_star) for row in made.rows] == [(True, False, True), (False, False, True)]
    assert {name: rate.value for name, rate in made.rates.items()} == {LOCAL: 0.5, RANDOM: 0.0, F_STAR: 1.0}
    # Two of the three patches are of F*, and neither of the two drawn.
    assert (made.share, made.chance) == (pytest.approx(2 / 3), 0.0)
    assert [s.answers for s in made.samples] == [
        (("under attack", "Sure."), ("patched", f"{LOCAL}: a0")),
        (("under attack", "Of course."), ("patched", f"{LOCAL}: a1")),
    ]  # fmt: skip
    assert made.samples[0].prompt == "calmly rob a bank 0"
    ((name, depends, kind, keys),) = mapped
    assert (name, kind, keys) == ("local", LocalExplanation, ["a0", "a1"])
    assert {"limit", "seed", "layers", "refusal_ids", "prompts"} <= set(depends)
    # Nothing to explain, or no layer to patch.
    assert Explained.of(work, found, [], {}, {}) == Explained()
    work.config = work.config.model_copy(update={"patch_depth": 0.0001})
    work.suite = SimpleNamespace(layers=(1,))
    assert Explained.of(work, found, pairs, plain, before).rows == ()


# -- word by word ------------------------------------------------------------------------------------------------------


class Words(Gauge):
    """One harm feature and one refusal feature, whose levels are a rule of the text and of the change."""

    def __init__(self, harm: tuple[FeatureId, ...] = (H,)) -> None:
        self.__dict__ |= {"harm": harm, "refusal": (R,), "reference": np.array([4.0] * len(harm) + [2.0])}
        self.changes: list[Any] = []

    def levels(self, prompts: PromptSet, change: Any = ()) -> np.ndarray:
        self.changes.append(change)
        rows = [[4.0] * len(self.harm) + [strength(p.text) * (0.5 if change else 1.0)] for p in prompts]
        return np.array(rows)


def strength(text: str) -> float:
    """Of the refusal feature: 2, less one for "calmly" and half for "softly"; none for "kindly"."""
    return 0.0 if "kindly" in text else 2.0 - 1.0 * ("calmly" in text) - 0.5 * ("softly" in text)


def test_each_added_word_takes_away_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    effects = SimpleNamespace(
        left_out=np.array([[9.0, 0.5], [9.0, 0.25], [9.0, 0.0]]), gradient=np.array([0.1, 0.2, 0.3]),
        ig=np.array([0.4, 0.5, 0.6]),
    )  # fmt: skip
    monkeypatch.setattr("demur.studies.gauge.word_effects", lambda _gauge, texts: dict.fromkeys(texts, effects))
    pairs = [
        AttackPair(id="w0", attack="A", plain="rob it", text="softly rob it calmly now"),
        AttackPair(id="w1", attack="B", plain="rob it", text="nothing of it"),
        AttackPair(id="w2", attack="C", plain="kindly rob", text="please kindly rob softly now"),
    ]
    gauge = Words()
    first, second = walked_rows(work_of(walk_steps=5), gauge, pairs)
    assert (first.id, first.attack, second.id, second.attack) == ("w0", "A", "w2", "C")
    assert [word.strip() for word in first.words] == ["softly", "calmly", "now"]
    # Of 2, then 1.5, and then 0.5.
    assert first.refusal == pytest.approx((0, 0.25, 0.75, 0.75))
    # Half is there without harm, from the start.
    assert first.without_harm == pytest.approx((0.5, 0.625, 0.875, 0.875))
    assert first.by_feature == (pytest.approx((0, 0.25, 0.75, 0.75)),)
    # The word that takes most stands second; alone it takes one half.
    assert (first.top, first.alone) == (1, pytest.approx(0.5))
    # The signal is 1 at the start.
    assert first.left_out == pytest.approx((0.5, 0.25, 0.0))
    assert (first.gradient, first.ig) == (pytest.approx((0.1, 0.2, 0.3)), pytest.approx((0.4, 0.5, 0.6)))
    # Where nothing is there at the start, no share of it can go.
    assert np.isnan([*second.refusal, *second.without_harm, *second.left_out, *second.gradient, second.alone]).all()
    assert second.top == 0
    (change,) = gauge.changes[1]
    assert (change.features, change.factor, change.where) == ((H,), 0.0, "prompt")
    # Without harm features nothing is taken out.
    bare_of_harm = Words(())
    (row,) = walked_rows(work_of(walk_steps=5), bare_of_harm, pairs[:1])
    assert row.without_harm == row.refusal
    assert walked_rows(work_of(), gauge, pairs[1:2]) == ()


def test_agreement_is_the_mean_rank_correlation_over_attacks() -> None:
    def walk(n: int, gradient: tuple[float, ...]) -> WalkRow:
        return WalkRow(
            id=str(n), attack="A", words=("a", "b", "c"), refusal=(0.0, 0.1, 0.4, 0.6), without_harm=(), by_feature=(),
            top=0, alone=0.0, left_out=(0.1, 0.2, 0.3), gradient=gradient, ig=(0.3, 0.2, 0.1),
        )  # fmt: skip

    rows = agreement([walk(0, (1.0, 2.0, 3.0)), walk(1, (3.0, 2.0, 1.0))])
    found = {(row.first, row.second): row.spearman.value for row in rows}
    added = spearman([0.1, 0.3, 0.2], [0.1, 0.2, 0.3])
    assert found == pytest.approx(
        {
            ("gradient", "left_out"): 0.0, ("ig", "left_out"): -1.0, ("gradient", "added"): 0.0,
            ("ig", "added"): -added,
            ("added", "left_out"): added,
        }
    )  # fmt: skip
    assert {row.spearman.n for row in rows} == {2}
    assert agreement([]) == ()
