"""The causal side of a feature's role where firing and refusal are rules: every effect and every interval is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from table_model import Done, TableModel, bare, features_of, numbered, splits_of

from demur.method.direction import Direction
from demur.method.interventions import ScaleFeatures
from demur.model import Region, TokenizedPrompt
from demur.stats import Estimate, wilson
from demur.studies.categories.causes import Causes, causal_role, effects, find_causes, without
from demur.studies.roles import FeatureRole, Roles
from demur.types import FeatureId

HARM, SMALL, LATE = FeatureId(0, 3), FeatureId(1, 9), FeatureId(3, 5)
REFUSAL, BACKUP, READ = FeatureId(2, 5), FeatureId(3, 7), FeatureId(3, 8)
SILENT, SOME, WAKER, MUTE = FeatureId(3, 9), FeatureId(3, 6), FeatureId(3, 4), FeatureId(4, 0)
EXACT = FeatureId(3, 3)
"""Its effect is a hundredth of the direction's on the test prompts."""
FEATURES = (LATE, HARM, SMALL, REFUSAL, BACKUP, READ, SILENT, SOME, EXACT)
CHOOSING, TEST = numbered("c", 3), numbered("t", 4)
SERVED = ("c0", "t0", "t1")
BOTH = (LATE, REFUSAL)
"""The refusal features, as they are found."""


def effect(prompt: str, feature: FeatureId, out: Any) -> float:
    """Nats that taking a feature out takes from the refusal log-odds, with what is out."""
    gone = set(BOTH) <= set(out)
    return {
        REFUSAL: 3.0, LATE: 2.0, HARM: 4.0 * (prompt in SERVED), SMALL: 1.0, SILENT: 7.0, SOME: 4.0 * (prompt == "t0"),
        BACKUP: 1.0 * gone, READ: 1.5 * gone, WAKER: 2.0 * gone, MUTE: 0.0,
        EXACT: 0.5,
    }[feature]  # fmt: skip


def fires(prompt: str, feature: FeatureId, gone: bool) -> tuple[float, float, float]:
    """On a special token, on the user's words, and after them."""
    nowhere, special, words, after = (0.0, 0.0, 0.0), (2.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 0.5)
    if feature == SILENT:
        return nowhere
    if feature in (BACKUP, WAKER, MUTE):
        return words if gone else special if (feature, prompt) == (BACKUP, "t2") else nowhere
    if feature == READ:
        return special if prompt == "t2" or (prompt in ("t0", "t1") and not gone) else after
    return words


class Work(TableModel):
    """Rows of stages are kept by their keys; `known` are there already."""

    sign = 1.0

    def __init__(self) -> None:
        super().__init__(self.odds_of, SimpleNamespace(), splits_of())
        regions = (Region.SPECIAL, Region.INSTRUCTION, Region.POST_INSTRUCTION)
        self.model.tokenize = lambda some: [TokenizedPrompt(p.id, (7, 8, 9), regions) for p in some]
        self.run.mapped, self.run.cached = self.mapped, self.keep
        norms = {3: torch.tensor([1.0] * 4 + [2.0] + [1.0] * 5), 4: torch.tensor([1.0, 9.0])}

        def layer(n: int) -> Any:
            return SimpleNamespace(decoder_norms=lambda: norms[n])

        self.suite = type(
            "Suite", (), {"layers": (1, 2, 3, 4), "identity": "S", "__getitem__": lambda _s, n: layer(n)}
        )()
        self.known, self.starts, self.passes = dict[str, Any](), list[Any](), list[Any]()

    def odds(self, prompts: Any, change: Any) -> Any:
        named = {p.id: p for p in (*CHOOSING, *TEST)}
        return super().odds([named[each.prompt_id] if hasattr(each, "prompt_id") else each for each in prompts], change)

    def odds_of(self, done: Done) -> float:
        assert {*done.scaled.values()} <= {0.0}
        name, out = done.prompt.id, tuple(done.scaled)
        whole = self.sign * (100.0 if name[0] == "c" else 50.0) * done.ablated
        return 500.0 + int(name[-1]) - whole - sum(effect(name, f, out) for f in out)

    def mapped(self, name: str, depends: Any, kind: Any, keys: Any, compute: Any, *, key: Any, progress: Any) -> Any:
        rows = self.stages.setdefault(f"{name} {depends!r}", dict(self.known))
        if not set(keys) <= set(rows):
            progress(1, 2)
            found = {key(row): row for batch in compute(lambda some: some[0] not in rows) for row in batch}
            assert all(isinstance(row, kind) for row in found.values())
            rows |= found
        return [rows[each] for each in keys]

    def keep(self, name: str, depends: Any, kind: Any, compute: Any) -> Any:
        return self.cached(name, depends, kind, compute)


@pytest.fixture(name="work")
def made(monkeypatch: pytest.MonkeyPatch) -> Work:
    work = Work()

    def first(model: Any, items: Any, ids: Any, change: Any, start: Any = None) -> Any:
        assert (model, tuple(ids)) == (work.model, (1, 2))
        work.passes.append(([item.prompt_id for item in items], change, start))
        return SimpleNamespace(log_odds=torch.tensor(work.odds(items, change)))

    def start(model: Any, items: Any, layer: int, change: Any) -> Any:
        assert model is work.model
        work.starts.append(([item.prompt_id for item in items], layer, change))
        return layer, change

    def compiled(model: Any, suite: Any, change: Any) -> Any:
        assert (model, suite) == (work.model, work.suite)
        return change

    def bound(suite: Any, *change: Any) -> Any:
        assert suite is work.suite
        return change

    def gone() -> bool:
        return any(set(BOTH) <= set(one.features) for one in work.open)

    def activations(model: Any, suite: Any, items: Any, features: Any) -> Any:
        assert (model, suite) == (work.model, work.suite)
        rows = [[fires(item.prompt_id, f, gone()) for f in features] for item in items]
        return [torch.tensor(each).reshape(len(features), 3).T for each in rows]

    def means(model: Any, suite: Any, items: Any, *, layers: Any, reduce: str) -> Any:
        assert (model, suite, reduce) == (work.model, work.suite, "max")
        # Those that choose say who wakes.
        assert [item.prompt_id for item in items] == list(CHOOSING.ids)
        later = {3: {WAKER: 4.0, BACKUP: 2.0, LATE: 1.5}, 4: {MUTE: 5.0, FeatureId(4, 1): 0.5}}
        before = {3: {WAKER: 1.0, BACKUP: 0.0, LATE: 1.5}, 4: {FeatureId(4, 1): 1.0}}
        size, now = {3: 10, 4: 2}, later if gone() else before
        return {n: torch.tensor([now[n].get(FeatureId(n, k), 0.0) for k in range(size[n])]) for n in layers}

    monkeypatch.setattr("demur.method.direction.first_token", first)
    monkeypatch.setattr("demur.method.direction.Start", SimpleNamespace(of=start))
    monkeypatch.setattr("demur.method.interventions.Compiled", compiled)
    monkeypatch.setattr("demur.method.interventions.bind", bound)
    monkeypatch.setattr("demur.method.activations.feature_activations", activations)
    monkeypatch.setattr("demur.method.activations.mean_activations", means)
    monkeypatch.setattr("demur.studies.categories.causes.find_roles", roles)
    return work


def role_of(feature: FeatureId) -> FeatureRole:
    role: Any = "refusal" if feature in (REFUSAL, LATE, SMALL, SILENT) else "harm"
    share = Estimate(value=0.9, low=0.8, high=1.0, n=3)
    return FeatureRole(feature=feature, role=role, instruction=feature.index, post_instruction=0, share=share)


def roles(work: Any, found: Any, features: Any) -> Roles:
    assert (type(work), found.direction.layer) == (Work, 1)
    return Roles(features=tuple(map(role_of, features)))


def found_in(work: Work) -> Any:
    direction = bare(Direction, ablate=lambda: "direction ablated", layer=1)
    return work.found(features_of(REFUSAL), ids=(1, 2), direction=direction)


def causes_of(work: Work, *features: FeatureId, **options: Any) -> Causes:
    given: dict[str, Any] = {"wakers": 3, **options}
    return find_causes(work, found_in(work), CHOOSING, TEST, features or FEATURES, **given)


# -- effects -----------------------------------------------------------------------------------------------------------


def test_a_feature_s_effect_is_what_refusal_falls_by_where_it_fires(work: Work) -> None:
    table = effects(work, found_in(work), TEST, (REFUSAL, READ, SILENT, HARM))
    assert table.tolist() == [[3.0, 0.0, 0.0, 4.0], [3.0, 0.0, 0.0, 4.0], [3.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]]
    # What never fires is never taken out.
    out = [change[0].features for _, change, _ in work.passes if change]
    assert out == [(HARM,), (REFUSAL,), (READ,)]
    assert {str(label) for label, *_ in work.told} == {"taking features out"}


def test_what_is_out_already_counts_and_passes_begin_where_they_part(work: Work) -> None:
    features = (WAKER, REFUSAL, READ, HARM)
    table = effects(work, found_in(work), TEST, features, BOTH)
    under = (ScaleFeatures(BOTH, 0.0),)
    # Refusal features are out: taking one out again does nothing.
    assert table[:, [0, 2, 3]].tolist() == [[2.0, 1.5, 4.0], [2.0, 1.5, 4.0], [2.0, 1.5, 0.0], [2.0, 1.5, 0.0]]
    assert work.starts == [(list(TEST.ids), layer, under) for layer in (0, 2, 3)]
    clean, *rest = work.passes
    assert clean == (list(TEST.ids), under, None)
    assert [(change[0].features[-1], start) for _, change, start in rest] == [
        (HARM, (0, under)), (REFUSAL, (2, under)), (WAKER, (3, under)), (READ, (3, under)),
    ]  # fmt: skip
    assert all(change[0].features[:2] == BOTH for _, change, _ in rest)
    assert [label for label, *_ in work.told] == ["taking features out after the refusal features"]


def test_only_prompts_on_which_it_fires_are_passed(work: Work) -> None:
    effects(work, found_in(work), TEST, (BACKUP,))
    assert [names for names, change, _ in work.passes if change] == [["t2"]]


def test_rows_that_are_there_are_not_computed_again(work: Work) -> None:
    other = FeatureId(3, 1)
    effects(work, found_in(work), TEST, (READ,))
    ((row, *_),) = (stage.values() for key, stage in work.stages.items() if key.startswith("effects"))
    work.known = {str(f): row.model_copy(update={"feature": str(f), "falls": (9.0,) * 4}) for f in (other, MUTE)}
    work.starts.clear()
    table = effects(work, found_in(work), TEST, (other, LATE, MUTE))
    assert table.T.tolist() == [[9.0] * 4, [2.0] * 4, [9.0] * 4]
    # No pass begins in a layer of which everything is known.
    assert [layer for _, layer, _ in work.starts] == [3]


def test_stages_name_what_their_numbers_depend_on(work: Work) -> None:
    causes_of(work)
    keys = list(work.stages)
    assert {key.partition(" ")[0] for key in keys} == {"effects", "firing", "woken", "whole_effect"}
    for key in keys:
        name = key.partition(" ")[0]
        assert ("'change': " in key, TEST.digest in key or CHOOSING.digest in key) == (True, True)
        assert ("'refusal_ids': (1, 2)" in key) == (name in ("effects", "whole_effect"))
        assert ("'features': " in key, "'saes': 'S'" in key) == ((name in ("effects", "firing")),) * 2
        assert ("'count': 3" in key, "'layers': [3, 4]" in key) == (name == "woken",) * 2
        assert ("direction ablated" in key) == (name == "whole_effect")


def test_features_are_out_at_0_and_without_any_nothing_changes() -> None:
    assert without((REFUSAL, LATE)) == (ScaleFeatures((REFUSAL, LATE), 0.0),)
    assert without(()) == ()


# -- roles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_feature_has_the_role_that_its_effects_show(work: Work, sign: float) -> None:
    work.sign = sign
    causes = causes_of(work, serves={HARM: SERVED})
    # An effect on the prompts that choose of exactly a hundredth of the direction's is none.
    assert (causes.refusal, causes.whole, causes.n) == (BOTH, sign * 50.0, 4)
    rows = {row.feature: row for row in causes.features}
    assert {f: row.role for f, row in rows.items()} == {
        HARM: "harm", REFUSAL: "refusal", LATE: "refusal", SMALL: "refusal", BACKUP: "redundant", READ: "conditional",
        WAKER: "redundant", SILENT: "inert", SOME: "unclear", MUTE: "inert",
        EXACT: "inert",
    }  # fmt: skip
    assert all(row.fires == role_of(f) for f, row in rows.items())
    # Best first; of equals, those that were asked for first.
    assert [row.feature for row in causes.features] == [
        HARM, REFUSAL, LATE, SMALL, SOME, EXACT, BACKUP, READ, SILENT, WAKER, MUTE,
    ]  # fmt: skip
    # Over the two test prompts that it serves; of the others over all four.
    assert (rows[HARM].alone.value, rows[HARM].alone.n) == (4.0, 2)
    assert (rows[SOME].alone.value, rows[SOME].alone.low, rows[SOME].alone.n) == (1.0, 0.0, 4)
    assert {f for f, row in rows.items() if row.after is None} == {HARM, REFUSAL, LATE, SMALL}
    assert {f for f, row in rows.items() if row.wakes is None} == {HARM, REFUSAL, LATE, SMALL}
    after = {f: row.after.value for f, row in rows.items() if row.after is not None}
    assert after == {BACKUP: 1.0, READ: 1.5, SILENT: 0.0, SOME: 1.0, WAKER: 2.0, MUTE: 0.0, EXACT: 0.5}
    # Before the first layer of a refusal feature.
    assert {f for f, row in rows.items() if row.upstream} == {HARM, SMALL}


def test_a_feature_wakes_where_it_fires_on_a_scored_token_only_then(work: Work) -> None:
    rows = {row.feature: row.wakes for row in causes_of(work).features}
    # On a special token it is as good as silent.
    assert rows[BACKUP] == Estimate.of(wilson(4, 4))
    # On three prompts in the end, on one of them before.
    assert rows[READ] == Estimate.of(wilson(2, 3))
    silent = rows[SILENT]
    assert silent is not None
    assert silent.n == 0


@pytest.mark.parametrize(
    ("wakers", "more"), [(0, set[Any]()), (1, {WAKER}), (2, {WAKER, MUTE}), (3, {WAKER, MUTE}), (9, {WAKER, MUTE})]
)
def test_wakers_are_those_that_rise_most_by_decoder_norm(work: Work, wakers: int, more: Any) -> None:
    """A rise of 3 with norm 2 is 6, before one of 5; then one that is asked for anyway. What falls never wakes."""
    causes = causes_of(work, wakers=wakers)
    assert {row.feature for row in causes.features} - set(FEATURES) == more


def test_without_later_layers_nothing_wakes(work: Work) -> None:
    type(work.suite).layers = (1, 2)  # pyright: ignore[reportAttributeAccessIssue]
    assert {row.feature for row in causes_of(work).features} == set(FEATURES)
    assert not any(key.startswith("woken") for key in work.stages)


def test_without_refusal_features_nothing_is_taken_out_with_others(work: Work) -> None:
    causes = causes_of(work, HARM, SMALL, READ)
    assert causes.refusal == ()
    rows = {row.feature: row for row in causes.features}
    # Over all prompts, as nothing says which it serves: two of four.
    assert (rows[HARM].alone.value, rows[HARM].alone.n, rows[READ].role) == (2.0, 4, "inert")
    assert all(row.after is None and row.wakes is None for row in rows.values())
    # Before the layer of the direction.
    assert [f for f, row in rows.items() if row.upstream] == [HARM]
    assert causes.of("inert", "unclear") == (HARM, READ)


def test_where_every_feature_acts_alone_nothing_is_asked_of_the_rest(work: Work) -> None:
    causes = causes_of(work, REFUSAL, LATE, wakers=0)
    assert [row.after for row in causes.features] == [None, None]
    assert causes.of("refusal") == (REFUSAL, LATE)


def between(low: float, high: float, n: int = 9) -> Estimate:
    return Estimate(value=(low + high) / 2, low=low, high=high, n=n)


NOTHING, WOKEN = between(0.0, 0.0), between(0.75, 1.0)


@pytest.mark.parametrize(
    ("alone", "after", "wakes", "role"),
    [
        (between(0.51, 0.9), None, None, "harm"),
        (between(0.5, 0.9), NOTHING, WOKEN, "unclear"),
        (between(0.25, 0.5), None, None, "inert"),
        (between(-0.5, 0.25), None, None, "inert"),
        (between(-0.51, 0.25), None, None, "unclear"),
        (NOTHING, between(0.51, 0.9), WOKEN, "redundant"),
        (NOTHING, between(0.51, 0.9), between(0.51, 0.9), "redundant"),
        (NOTHING, between(0.51, 0.9), between(0.5, 0.9), "conditional"),
        (NOTHING, between(0.51, 0.9), between(0.75, 1.0, n=0), "conditional"),
        (NOTHING, between(0.51, 0.9), None, "conditional"),
        (NOTHING, between(0.5, 0.9), WOKEN, "unclear"),
        (NOTHING, between(0.25, 0.5), WOKEN, "inert"),
        (NOTHING, between(-0.5, 0.0), WOKEN, "inert"),
        (NOTHING, between(-0.51, 0.0), WOKEN, "unclear"),
    ],
)
def test_a_role_needs_whole_intervals_beyond_or_within_the_limit(
    alone: Estimate, after: Any, wakes: Any, role: str
) -> None:
    assert causal_role(role_of(HARM), alone, after, wakes, 0.5) == role
