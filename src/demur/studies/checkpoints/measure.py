"""What is measured of two checkpoints on the same prompts: drives, activations, directions, P(harmful), P(refuse)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from demur.errors import ModelError
from demur.guard import Labelled, Reading, best_probe, fit_probe, read_prompts
from demur.method.activations import feature_activations, over_regions
from demur.method.direction import first_token
from demur.method.interventions import Compiled, ScaleFeatures
from demur.method.matching import unit_rows
from demur.stats import Estimate, bootstrap_mean, bootstrap_of
from demur.studies.checkpoints.rule import Mechanism
from demur.studies.context import Context, Workspace
from demur.studies.drive import Features, drives, falls, interval_of, random_sets, share_of
from demur.studies.inputs import Inputs
from demur.studies.pipeline import Found, find
from demur.studies.roles import find_roles
from demur.types import PromptSet, RefusalToken, Split

_Rows = list[list[float]]


@dataclass(frozen=True)
class Side:
    """One checkpoint: its workspace, and what the search found in it (None: it never refuses)."""

    name: str
    work: Workspace[Any]
    found: Found | None

    @classmethod
    def of(cls, name: str, work: Workspace[Any], context: Context[Any]) -> Side:
        """With the same search, on the same prompts. A checkpoint without refusals has no F*; that is a finding here,
        and the study warns of it."""
        try:
            found = find(work, context.splits.choosing)
        except ModelError as error:
            context.warn(f"{name} has no F*: {str(error).splitlines()[0].removesuffix(' For example:')}")
            found = None
        tuning = (work.answer(f"clean: tuning, {label}", prompts) for label, prompts in context.splits.tuning)
        work.watch_coherence([answer for each in tuning for answer in each.answers])
        return cls(name, work, found)

    @property
    def tokens(self) -> tuple[RefusalToken, ...]:
        return () if self.found is None else self.found.clean.tokens

    @cached_property
    def refusal_features(self) -> Features:
        """Those of F* that tell the classes apart after the request. Harm features, on its words, are read by any
        mechanism; what drives refusal is downstream of them."""
        if self.found is None:
            return ()
        roles = find_roles(self.work, self.found)
        if not (kept := roles.of("refusal")):
            kept = roles.of("refusal", "mixed") or self.found.chosen.features
            self.work.warn(f"no feature of the F* of {self.name} is clearly a refusal feature; others stand for them")
        return kept

    def random_sets(self, features: Features) -> tuple[Features, ...]:
        """Random sets matched to features, drawn here and used in both checkpoints."""
        return () if self.found is None else random_sets(self.work, self.found, features)

    def read_in(self, other: Side) -> Workspace[Any]:
        """The other checkpoint, read with this one's SAEs: features keep their meaning."""
        if other is self:
            return self.work
        inputs: Inputs = replace(other.work.inputs, suite=self.work.suite)
        work = self.work.on(inputs)
        work.judging = other.work.judging
        return work


@dataclass(frozen=True)
class Pair:
    """Two checkpoints and the test prompts."""

    after: Side
    before: Side
    prompts: Split

    @property
    def refusal_ids(self) -> tuple[int, ...]:
        """First tokens of either one's refusals: one measure for both."""
        return tuple(dict.fromkeys(t.token_id for side in (self.after, self.before) for t in side.tokens))

    def other(self, side: Side) -> Side:
        return self.before if side is self.after else self.after

    def mechanism(self, side: Side, features: Features, factor: float) -> Mechanism:
        """What features found in one checkpoint do in both, with the same random sets and prompts."""
        sets = (features, *side.random_sets(features))
        works = [side.read_in(each) for each in (side, self.other(side))]
        own, other = drives([falls(work, self.prompts, self.refusal_ids, sets, factor) for work in works])
        high, low = (np.stack([contrast(work, each, features) for work in works], 1) for _, each in self.prompts)
        n = len(high) + len(low)
        return Mechanism(
            features=features,
            own=interval_of(own, n),
            other=interval_of(other, n),
            carried=interval_of(share_of(other, own), n),
            fires=bootstrap_of(lambda h, l: share_of((h - l)[..., 1], (h - l)[..., 0]), high, low),
        )


def activations(work: Workspace[Any], prompts: PromptSet, features: Features) -> np.ndarray:
    """Maximum activation over each prompt's scored tokens, shape (prompt, feature), in the SAE's units."""

    def compute() -> _Rows:
        items = work.model.tokenize(prompts)
        values = feature_activations(work.model, work.suite, items, features)
        return over_regions(items, values).tolist()

    depends = {"prompts": prompts.digest, "features": features}
    return np.array(work.cached("maximum-activations", depends, _Rows, compute)).reshape(-1, len(features))


def contrast(work: Workspace[Any], prompts: PromptSet, features: Features) -> np.ndarray:
    """Sum over features of their maximum activation times the norm of their decoder row, shape (prompt,)."""
    return activations(work, prompts, features) @ unit_rows(work.suite, features)[1].numpy()


def readings(side: Side, prompts: PromptSet) -> list[np.ndarray]:
    """Residual of each layer, mean over the scored tokens, then of each layer at the prompt's last token; one pass,
    arrays of shape (prompt, d_model). They are not kept: they would fill the run folder."""
    layers = range(side.work.model.n_layers)
    wanted = [Reading(kind="dense", layer=layer, pooling=p) for p in ("mean", "last") for layer in layers]
    return list(read_prompts(side.work.model, prompts.prompts, wanted))


def direction_cosines(pair: Pair, harmful: PromptSet, harmless: PromptSet) -> list[tuple[Estimate, float]]:
    """Layer by layer, the cosine of the two checkpoints' differences in means (harmful less harmless prompts, last
    token, by label, so that a checkpoint that refuses nothing has one too); and, as a yardstick, the mean cosine of
    the differences of two halves of the prompts in each."""

    def compute() -> list[tuple[Estimate, float]]:
        start = pair.after.work.model.n_layers
        sides = [[readings(side, p)[start:] for p in (harmful, harmless)] for side in (pair.after, pair.before)]
        return [_cosine(*((high[layer], low[layer]) for high, low in sides)) for layer in range(start)]

    depends = {"before": pair.before.work.identity, "prompts": [harmful.digest, harmless.digest]}
    return pair.after.work.cached(
        "checkpoint-cosines", depends, list[tuple[Estimate, float]], compute, "directions by layer"
    )


def _cosine(*sides: tuple[np.ndarray, np.ndarray]) -> tuple[Estimate, float]:
    random, sizes = np.random.default_rng(0), [len(each) for each in sides[0]]
    counts = [random.multinomial(n, np.full(n, 1 / n), size=500) / n for n in sizes]
    weights = [np.vstack([np.full(n, 1 / n), w]) for n, w in zip(sizes, counts, strict=True)]
    first, second = (weights[0] @ high.astype(float) - weights[1] @ low.astype(float) for high, low in sides)
    halves = [
        [high[part::2].astype(float).mean(0) - low[part::2].astype(float).mean(0) for part in (0, 1)]
        for high, low in sides
    ]
    yardstick = float(np.mean([_cos(a, b) for a, b in halves]))
    return interval_of(_cos(first, second), sum(sizes)), yardstick


def _cos(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray(np.divide((a * b).sum(-1), norms, out=np.full_like(norms, np.nan), where=norms > 0))


def p_harmful(side: Side, context: Context[Any], tests: Sequence[PromptSet]) -> list[np.ndarray]:
    """P(harmful) of the prompts of each test set: a linear probe of the mean residual, fitted in each checkpoint by
    the prompts' labels, never by its answers. The layer is the one with the least log loss on the tuning prompts."""
    splits = context.splits

    def compute() -> _Rows:
        train, check, choice = (
            _labelled(side, each.harmful, each.harmless) for each in (splits.direction, splits.selection, splits.tuning)
        )
        probe = best_probe(
            (fit_probe(Reading(kind="dense", layer=layer, pooling="mean"), train(layer), check(layer)), choice(layer))
            for layer in range(side.work.model.n_layers)
        )
        (layer,) = probe.reading.layers
        return [probe.probability(readings(side, each)[layer]).tolist() for each in tests]

    depends = {
        "tests": [each.digest for each in tests],
        "splits": [each.digest for _, split in splits.choosing for _, each in split],
    }
    rows = side.work.cached("p-harmful", depends, _Rows, compute, f"P(harmful): {side.name}")
    return [np.array(row) for row in rows]


def _labelled(side: Side, harmful: PromptSet, harmless: PromptSet) -> Any:
    high, low = readings(side, harmful), readings(side, harmless)
    labels = np.repeat([True, False], [len(harmful), len(harmless)])
    return lambda layer: Labelled(np.vstack([high[layer], low[layer]]), labels)


def unexplained(side: Side, suite_of: Side, prompts: PromptSet, layers: Sequence[int]) -> dict[int, float]:
    """FVU of the SAEs at some layers, over the scored tokens of some prompts."""
    from demur.method.fidelity import reconstruction
    from demur.model import SCORED_REGIONS

    found: dict[int, float] = {}
    work = suite_of.read_in(side)
    for layer in layers:

        def compute(layer: int = layer) -> float:
            dense = work.suite[layer].dense()
            sums = reconstruction(work.model, dense, work.model.tokenize(prompts), SCORED_REGIONS)
            return float(sums.error.sum() / max(float(sums.spread.sum()), 1e-12))

        found[layer] = work.cached("fvu-scored", {"layer": layer, "prompts": prompts.digest}, float, compute)
    return found


def alone(pair: Pair, work: Workspace[Any], features: Features, prompts: PromptSet) -> list[Estimate]:
    """Fall of the refusal log-odds of harmful prompts when each feature alone is taken out of a checkpoint."""

    def compute() -> _Rows:
        items, rows = work.model.tokenize(prompts), list[list[float]]()
        for n, change in enumerate([(), *((ScaleFeatures((each,), 0.0),) for each in features)]):
            compiled = Compiled(work.model, work.suite, change)
            rows.append(first_token(work.model, items, pair.refusal_ids, compiled).log_odds.tolist())
            work.progress("features one by one", n, len(features))
        return rows

    depends = {"prompts": prompts.digest, "features": features, "refusal_ids": pair.refusal_ids}
    clean, *taken = np.array(work.cached("alone", depends, _Rows, compute))
    return [bootstrap_mean(clean - each) for each in taken]
