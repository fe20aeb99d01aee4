"""The guard that `demur probes` leaves, of probes whose weights and log-odds are written by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from page_parts import about
from probe_results import probed
from scipy.special import expit
from table_model import TableModel, bare

import demur
from demur.guard import Probe, Reading, Stream
from demur.model import ChatModel
from demur.saes import FeatureRows
from demur.stats import Estimate
from demur.studies.gauge import Gauge
from demur.studies.probes.fitting import Bench, Fitted
from demur.studies.probes.fold import make_guard, measured
from demur.studies.probes.inputs import Sets
from demur.studies.probes.measure import Scores
from demur.studies.probes.results import ALL, DENSE, HARM, REFUSAL, ProbeRow, Target
from demur.types import FeatureId

A, B, C, D = FeatureId(2, 7), FeatureId(0, 3), FeatureId(2, 1), FeatureId(1, 5)
EVERY = (A, B, C, D)


def of_features(*weights: float, features: Any = EVERY, unit: bool = False) -> Probe:
    reading = Reading(kind="features", features=features[: len(weights)], pooling="max")
    return Probe(reading, np.array(weights, np.float32), 0.5, unit)


def residual(*weights: float) -> Probe:
    return Probe(Reading(kind="dense", layer=3, pooling="mean"), np.array(weights, np.float32), 0.25)


def fitted(name: str, target: Target, probe: Probe, top: float = 4.0) -> Fitted:
    """A hundred negatives up to `top`, and 41 positives from 0 to 2."""
    row = ProbeRow(
        target=target, representation=name, pooling="max", layer=None, dim=1, used=1, loss=0.0, auroc=1.0, tried=1
    )
    negatives = np.linspace(top - 9.9, top, 100)
    return Fitted(name, target, probe, row, negatives, np.linspace(0, 2, 41), np.zeros(1))


class Shelf:
    """SAEs whose rows tell what is asked for."""

    source, identity = "/somewhere/else/saes/gpt", "key"

    def __getitem__(self, layer: int) -> Any:
        return SimpleNamespace(rows=lambda indices: bare(FeatureRows, asked=(layer, indices)))


MODEL: Any = bare(ChatModel)
STREAM = Stream(residual(1.0), 2, 0.0)


def guard_of(
    harm: Probe, refuse: Probe, sparse: tuple[Probe | None, Probe | None] = (None, None), revision: Any = "v1"
) -> Any:
    """A guard of the probes called "one" and "two"; those of harm and refusal features may be there besides."""
    context = TableModel(lambda _: 0.0, SimpleNamespace(saes_revision=revision))
    context.model, context.suite = MODEL, Shelf()
    probes: dict[Any, dict[str, Fitted]] = {
        # Of each name, a probe for the other target too, which is not to be taken.
        "harmful": {"one": fitted("one", "harmful", harm), "two": fitted("two", "harmful", residual(9), 8.0)},
        "refuse": {"two": fitted("two", "refuse", refuse, 3.0), "one": fitted("one", "refuse", residual(9), 8.0)},
    }
    for target, name, probe in zip(("harmful", "refuse"), (HARM, REFUSAL), sparse, strict=True):
        if probe is not None:
            probes[target][name] = fitted(name, target, probe)
    gauge = bare(Gauge, harm=(A,), refusal=(B, C), reference=np.array([1.5, 2.5, 3.5]))
    scores = Scores(bare(Bench, gauge=gauge), Sets(()), probes, {}, {}, {})
    return make_guard(context, scores, "one", "two", STREAM)


def asked(guard: Any) -> list[tuple[int, Any]]:
    assert all(layer == rows.asked[0] for layer, rows in guard.rows.items())
    return [rows.asked for rows in guard.rows.values()]


def test_the_guard_is_of_the_two_probes_that_won() -> None:
    harm, refuse = residual(1, 0, 2), residual(3)
    guard = guard_of(harm, refuse)
    assert (guard.harm, guard.refuse, guard.stream, guard.model) == (harm, refuse, STREAM, MODEL)
    # At 1 % of a hundred negatives one may be above, at 5 % five; 95 % of 41 positives are above the third.
    assert guard.thresholds == {
        "harmful": {"0.01": pytest.approx(expit(3.9)), "0.05": pytest.approx(expit(3.5))},
        "refuse": {"0.01": pytest.approx(expit(2.9)), "0.05": pytest.approx(expit(2.5))},
        "refusing": {"0.95": pytest.approx(expit(0.1))},
    }
    assert (guard.sparse, guard.rows, guard.points, guard.version) == (None, {}, (), demur.__version__)
    assert (guard.saes.source, guard.saes.identity, guard.saes.revision) == ("saes/gpt", "key", "v1")
    assert guard_of(harm, refuse, revision=None).saes.revision == ""


def test_features_explain_where_there_are_probes_of_both_kinds() -> None:
    dense = residual(1.0)
    harm, refusal = of_features(1), of_features(1, 2, features=(B, C))
    guard = guard_of(dense, dense, (harm, refusal))
    assert (guard.sparse.harm, guard.sparse.refusal) == (harm, refusal)
    assert guard.sparse.reference == {A: 1.5, B: 2.5, C: 3.5}
    assert asked(guard) == [(2, (7, 1)), (0, (3,))]
    for lone in ((harm, None), (None, refusal)):
        guard = guard_of(dense, dense, lone)
        assert (guard.sparse, guard.rows) == (None, {})


def test_rows_are_kept_of_features_that_are_read_and_once() -> None:
    """Those of the probes that detect, without weights that are 0, then those of the probes that explain."""
    explaining = of_features(0, 1, features=(C, B)), of_features(1, features=(D,))
    assert asked(guard_of(of_features(1, 0, 2, 0), of_features(0, 3, 0), explaining)) == [
        (2, (7, 1)), (0, (3,)), (1, (5,)),
    ]  # fmt: skip
    assert asked(guard_of(of_features(1, 0, 2, 0), of_features(0, 3, 0))) == [(2, (7, 1)), (0, (3,))]


def test_weights_that_are_0_are_left_out_of_a_probe_of_features() -> None:
    kept = guard_of(of_features(0, -2, 0, 1), of_features(0, 0, 3))
    assert kept.harm.reading == Reading(kind="features", features=(B, D), pooling="max")
    assert (kept.harm.weights.tolist(), kept.harm.bias) == ([-2, 1], 0.5)
    assert (kept.refuse.reading.features, kept.refuse.weights.tolist()) == ((C,), [3])
    assert kept.harm.logit(np.array([[4.0, 5.0]])) == pytest.approx([-8 + 5 + 0.5])
    # But where all are 0 or none is, or a value's length counts; and a residual has no features.
    for whole in (of_features(0, 0), of_features(1, 2), of_features(0, 2, unit=True), residual(0, 1)):
        assert guard_of(whole, residual(1.0)).harm is whole


def test_points_are_what_was_measured_of_the_winner() -> None:
    result = probed()
    guard = measured(guard_of(residual(1.0), residual(1.0)), result)
    own = [p for p in guard.points if p.detector == "harmful"]
    rows = [row for row in result.flags if (row.target, row.representation) == ("harmful", HARM)]
    assert [(p.prompts, p.fpr, p.flagged) for p in own] == [(r.prompts, r.fpr, r.flagged) for r in rows]
    assert {p.prompts: p.positive for p in own} == {
        "plain harmful": True, "plain benign": False, "A": True, "B": True, "benign in A": False, "over": False,
        "polite": False, "request in text": True, "text": False, ALL: True,
    }  # fmt: skip
    rest = [(p.detector, p.prompts, p.positive, p.fpr, p.flagged.value) for p in guard.points if p not in own]
    assert rest == [
        ("jailbreak", "attacks that succeeded", True, 0.01, 0.63), ("jailbreak", "plain benign", False, 0.01, 0.03),
        ("stream", "succeeded attacks", True, 0.0, 0.81), ("stream", "benign", False, 0.0, 0.06),
    ]  # fmt: skip
    assert guard.harm.bias == 0.25


def test_what_was_not_measured_is_no_point() -> None:
    guard = guard_of(residual(1.0), residual(1.0))
    result = probed()
    assert result.stream is not None
    nothing = result.stream.model_copy(update={"stopped": Estimate.unknown()})
    points = measured(guard, probed(stream=nothing)).points
    assert [p.prompts for p in points if p.detector == "stream"] == ["benign"]
    points = measured(guard, probed(stream=None, winner=DENSE)).points
    assert {p.detector for p in points} == {"harmful", "jailbreak"}
    shares = [row.flagged for row in result.flags if (row.target, row.representation) == ("harmful", DENSE)]
    assert [p.flagged for p in points if p.detector == "harmful"] == shares
    none = result.model_copy(update={"flags": (), "verdicts": ()})
    assert [p.flagged for p in measured(guard, none).points] == [about(0.81), about(0.06)]
