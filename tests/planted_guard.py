"""The planted model with a guard whose probes are known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from demur.guard import Guard, Labelled, OperatingPoint, Reading, SaeName, Sparse, Stream, fit_probe, read_prompts
from demur.model import ChatModel
from demur.stats import Estimate, wilson
from demur.testing import Planted, planted


class Made(NamedTuple):
    truth: Planted
    model: ChatModel


def planted_model() -> Made:
    found = planted()
    return Made(found, ChatModel(found.model, found.tokenizer, name="planted"))


def values(made: Made, reading: Reading, part: slice) -> Labelled:
    """A reading of some harmful and as many harmless prompts."""
    texts = [made.truth.harmful.texts[part], made.truth.harmless.texts[part]]
    (found,) = read_prompts(made.model, [*texts[0], *texts[1]], [reading], made.truth.suite)
    return Labelled(found, np.repeat([True, False], [len(texts[0]), len(texts[1])]))


def planted_guard(made: Made) -> Guard:
    """Harm read by the residual after layer 0 at any token, refusal by that after layer 2 at the last one."""
    suite = made.truth.suite
    harm_features, refusal_features = sorted(made.truth.truth.harm), sorted(made.truth.truth.refusal)
    readings = (
        Reading(kind="dense", layer=0, pooling="mean"),
        Reading(kind="dense", layer=2, pooling="last"),
        Reading(kind="features", features=tuple(harm_features), pooling="max"),
        Reading(kind="features", features=tuple(refusal_features), pooling="last"),
        Reading(kind="dense", layer=1, pooling="last"),
    )
    harm, refuse, sparse_harm, sparse_refusal, stream = (
        fit_probe(each, values(made, each, slice(0, 30)), values(made, each, slice(30, 50))) for each in readings
    )
    features = (*harm_features, *refusal_features)
    layers = {f.layer for f in features}
    rows = {layer: suite[layer].rows([f.index for f in features if f.layer == layer]) for layer in layers}
    return Guard(
        model=made.model,
        harm=harm,
        refuse=refuse,
        thresholds={"harmful": {"0.01": 0.5, "0.05": 0.25}, "refuse": {"0.01": 0.5, "0.05": 0.25}},
        sparse=Sparse(sparse_harm, sparse_refusal, dict.fromkeys(features, 1.0)),
        rows=rows,
        stream=Stream(stream, window=2, threshold=0.0),
        saes=SaeName(source="memory", identity=suite.identity),
        points=(
            OperatingPoint(
                detector="harmful", prompts="plain", positive=True, fpr=0.01, flagged=Estimate.of(wilson(9, 10))
            ),
        ),
        version="1.0",
    )
