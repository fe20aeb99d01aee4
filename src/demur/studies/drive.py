"""What a set of features does to refusal, beyond random sets matched to it: the drive, with crossed intervals.

The drive of a set is the fall of the refusal log-odds when it is scaled (nats), on harmful less harmless prompts, so
that features which push all answers alike do not count, and less the same of random sets matched to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from demur.method.interventions import ScaleFeatures, SetFeatures
from demur.stats import Estimate, bootstrap_interval
from demur.studies.context import Change, Workspace
from demur.studies.gauge import log_odds
from demur.studies.methods import RandomMatched, Selection
from demur.studies.pipeline import Found
from demur.types import FeatureId, FeatureSet, Split

Features = tuple[FeatureId, ...]


def as_set(features: Features) -> FeatureSet:
    """Features as a set without scores."""
    return FeatureSet(features=features, scores=(0.0,) * len(features), scope="global", method="given")


def random_sets(work: Workspace[Any], found: Found, features: Features) -> tuple[Features, ...]:
    """Random sets matched to features one by one, in layer, firing rate and size of what they move; none of the pool.
    As many as the configuration's `random_sets`."""
    config, used = work.config, found.clean.used("selection")
    seeds, like = range(config.seed, config.seed + config.random_sets), as_set(features)

    def draw() -> tuple[FeatureSet, ...]:
        return RandomMatched().draw(Selection(work, replace(found, chosen=like), len(features)), seeds)

    depends: dict[str, Any] = {"method": "matched", "features": features, "pool": found.pool.features}
    depends |= {"seeds": list(seeds), "prompts": [used.harmful.digest, used.harmless.digest]}
    drawn = work.cached("feature_sets", depends, tuple[FeatureSet, ...], draw, "features: random")
    return tuple(each.features for each in drawn)


def set_to_maxima(work: Workspace[Any], found: Found, features: Features) -> Change:
    """Features set on a prompt to their own mean maximum activation on the refused harmful selection prompts."""
    values = Selection(work, found, len(features)).maxima(as_set(features))
    return (SetFeatures(features, values, "prompt"),)


def falls(
    work: Workspace[Any], prompts: Split, refusal_ids: Sequence[int], sets: Sequence[Features], factor: float
) -> Effects:
    """Fall of the refusal log-odds of each prompt when each set is scaled, nats."""
    tables: list[np.ndarray] = []
    for asked in (prompts.harmful, prompts.harmless):
        clean = np.array(log_odds(work, asked, refusal_ids))
        scaled = work.each(partial(log_odds, work, asked, refusal_ids, (ScaleFeatures(each, factor),)) for each in sets)
        tables.append(np.stack([clean - each for each in scaled]))
    return Effects(*tables)


class Effects(NamedTuple):
    """Effect of a set of features and then of each random one on each prompt, shape (1 + sets, prompt)."""

    harmful: np.ndarray
    harmless: np.ndarray


def drives(effects: Sequence[Effects], resamples: int = 2000, seed: int = 0) -> list[np.ndarray]:
    """Drive of a set of features, in several checkpoints on the same prompts and with the same random sets: its mean
    effect on harmful prompts less that on harmless ones, less the same of the random sets.

    Args:
        effects: of each checkpoint.
        resamples, seed: of the bootstrap over harmful prompts, harmless prompts and sets, crossed. A few sets resampled
            vary less than sets drawn anew, by `(m − 1) / m`, so their deviations are stretched.

    Returns:
        Of each checkpoint the value and then its resampled values, shape (1 + resamples,).
    """
    random = np.random.default_rng(seed)

    def weights(n: int, stretch: float = 1.0) -> np.ndarray:
        drawn = random.multinomial(n, np.full(n, 1 / n), size=resamples) / n
        return np.vstack([np.full(n, 1 / n), 1 / n + stretch * (drawn - 1 / n)])

    sets = len(effects[0].harmful) - 1
    high, low = (weights(table.shape[1]) for table in effects[0])
    by_set = weights(sets, float(np.sqrt(sets / max(sets - 1, 1))))
    found: list[np.ndarray] = []
    for each in effects:
        means = high @ each.harmful.T - low @ each.harmless.T
        found.append(means[:, 0] - (means[:, 1:] * by_set).sum(1))
    return found


def interval_of(values: np.ndarray, n: int) -> Estimate:
    """A value and its resampled values, as of `drives`, with the percentile interval."""
    return bootstrap_interval(float(values[0]), values[1:], n)


def share_of(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """A part of a whole; nan where there is none."""
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
