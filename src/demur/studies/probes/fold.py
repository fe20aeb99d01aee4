"""The guard of a run: what won on validation prompts, with thresholds, explanations, and what was measured of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from demur import __version__
from demur.guard import Guard, OperatingPoint, Probe, Reading, SaeName, Sparse, Stream
from demur.studies.context import Context
from demur.studies.probes.measure import Scores
from demur.studies.probes.results import FPRS, HARM, REFUSAL, ProbesResult
from demur.types import by_layer


def make_guard(context: Context[Any], scores: Scores, winner: str, refuser: str, stream: Stream | None) -> Guard:
    """Put the guard together; what was measured of it is added by `measured`."""
    harm, refuse = scores.fitted["harmful"][winner], scores.fitted["refuse"][refuser]
    explaining = scores.fitted["harmful"].get(HARM), scores.fitted["refuse"].get(REFUSAL)
    gauge, sparse = scores.bench.gauge, None
    if explaining[0] is not None and explaining[1] is not None:
        reference = dict(zip(gauge.features, gauge.reference.tolist(), strict=True))
        sparse = Sparse(explaining[0].probe, explaining[1].probe, reference)
    kept = [_without_zeros(each.probe) for each in (harm, refuse)]
    read = [probe.reading.features for probe in (*kept, *((sparse.harm, sparse.refusal) if sparse else ()))]
    wanted = by_layer(dict.fromkeys(feature for features in read for feature in features))
    return Guard(
        model=context.model,
        harm=kept[0],
        refuse=kept[1],
        thresholds={
            axis: {f"{fpr:g}": float(expit(each.threshold(fpr))) for fpr in FPRS}
            for axis, each in (("harmful", harm), ("refuse", refuse))
        }
        | {"refusing": {"0.95": float(expit(refuse.usual))}},
        sparse=sparse,
        rows={layer: context.suite[layer].rows(indices) for layer, indices in wanted.items()},
        stream=stream,
        saes=SaeName(
            source="/".join(Path(context.suite.source).parts[-2:]),
            identity=context.suite.identity,
            revision=str(context.config.saes_revision or ""),
        ),
        version=__version__,
    )


def measured(guard: Guard, result: ProbesResult) -> Guard:
    """The guard with what the study measured of it."""
    return replace(guard, points=tuple(_points(result, result.winner)))


def _without_zeros(probe: Probe) -> Probe:
    """A probe of features without those whose weight is 0 (L1), so that their rows need not be kept."""
    places = np.flatnonzero(probe.weights)
    if probe.reading.kind == "dense" or probe.unit or len(places) in (0, len(probe.weights)):
        return probe
    features = tuple(probe.reading.features[place] for place in places)
    reading = Reading(kind="features", features=features, pooling=probe.reading.pooling)
    return replace(probe, reading=reading, weights=probe.weights[places])


def _points(result: ProbesResult, winner: str) -> list[OperatingPoint]:
    """What was measured of the harm probe, set by set, of the verdict, and of streaming."""
    positive = {row.name: row.positive for row in result.sets}
    points = [
        OperatingPoint(
            detector="harmful", prompts=row.prompts, positive=positive.get(row.prompts, True), fpr=row.fpr,
            flagged=row.flagged,
        )
        for row in result.flags
        if (row.target, row.representation) == ("harmful", winner)
    ]  # fmt: skip
    points += [
        OperatingPoint(
            detector="jailbreak", prompts=row.group, positive="succeeded" in row.group, fpr=FPRS[0],
            flagged=row.jailbreak,
        )
        for row in result.verdicts
    ]  # fmt: skip
    if result.stream is not None:
        shares = {"succeeded attacks": result.stream.stopped, "benign": result.stream.benign}
        points += [
            OperatingPoint(detector="stream", prompts=name, positive=name != "benign", fpr=0.0, flagged=share)
            for name, share in shares.items()
        ]
    return [point for point in points if point.flagged.n]
