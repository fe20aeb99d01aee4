"""Which strength and which threshold: what the choosing prompts say, within the budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from demur.studies.harden.results import GATINGS, SUCCEEDED, ChoiceRow, Gating

if TYPE_CHECKING:
    from demur.studies.harden.arms import Arm
    from demur.studies.harden.bench import Bench, Told

RATES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of the choosing prompts that candidate thresholds leave on the wrong side."""


def thresholds(bench: Bench) -> tuple[float, ...]:
    """Candidate thresholds on P(harmful), ascending: those that so many benign prompts exceed, and those that so many
    of the attacks that succeed (all harmful prompts, if none does) stay below."""

    def scores(names: Sequence[str]) -> np.ndarray:
        return np.concatenate([bench.scores(bench.sets[name]) for name in names])

    shares = np.array(RATES)
    benign = np.quantile(scores(bench.benign), 1 - shares, method="higher")
    harmful = np.quantile(scores((SUCCEEDED,) if bench.succeeded else bench.harmful), shares, method="lower")
    # "Harmful" begins at the threshold: just beyond the benign prompt itself.
    return tuple(float(each) for each in np.unique([*np.nextafter(benign, np.inf), *harmful]))


def choose(bench: Bench, arm: Arm, budget: float) -> dict[Gating, ChoiceRow]:
    """For each gating a setting that loses no more than the budget. Those within one standard error of the most gain
    count as equal; of them the one that loses least is taken, then the mildest strength, then the threshold that acts
    on the fewest prompts. Where none is within the budget, the one with the least loss."""
    if arm.purpose == "harden":
        n = len(set(bench.requests))  # Attacks on one request are alike.
    else:
        n = sum(int((bench.clean(name).refused == 1).sum()) for name in bench.benign)
    found: dict[Gating, ChoiceRow] = {}
    for gating in GATINGS:
        rows = list(_settings(bench, arm, gating, budget))
        if allowed := [row for row in rows if row.allowed]:
            least = max(row.gain for row in allowed)
            least -= _standard_error(least, n)
            found[gating] = max((row for row in allowed if row.gain >= least), key=lambda row: (-row.loss, *mild(row)))
        else:
            found[gating] = max(rows, key=lambda row: (-row.loss, row.gain, *mild(row)))
    return found


def _standard_error(share: float, n: int) -> float:
    """Of a share of `n`, with one success and one failure more: all of a few are no certainty."""
    p = (share * n + 1) / (n + 2)
    return math.sqrt(p * (1 - p) / (n + 2))


def mild(row: ChoiceRow) -> tuple[float, float]:
    """How mild the strength is, and on how few prompts the threshold lets it act: more is milder."""
    repair, threshold = row.purpose == "repair", row.threshold or 0.0
    return (-abs(row.strength - 1), -threshold) if repair else (-row.strength, threshold)


def _settings(bench: Bench, arm: Arm, gating: Gating, budget: float) -> Iterator[ChoiceRow]:
    cuts: Sequence[float | None] = thresholds(bench) if gating == "probe" else (None,)
    for strength in arm.strengths:
        for threshold in cuts:
            gain, loss = outcome(bench, arm, strength, gating, threshold)
            yield ChoiceRow(
                purpose=arm.purpose,
                arm=arm.name,
                gating=gating,
                strength=strength,
                threshold=threshold,
                gain=gain,
                loss=loss,
                allowed=loss <= budget + 1e-12,
            )


def outcome(bench: Bench, arm: Arm, strength: float, gating: Gating, threshold: float | None) -> tuple[float, float]:
    """Gain and loss of a setting on a side's prompts, shares of the answers that are scored; 0 where a set holds no
    prompt that could be gained or lost."""

    def told(name: str) -> tuple[Told, Told]:
        fires = bench.fires(arm, gating, name, threshold)
        return bench.gated(arm, strength, name, fires), bench.clean(name)

    def gone(after: np.ndarray, before: np.ndarray) -> float:
        return _share(1 - after[:, before[0] == 1])

    benign = [told(name) for name in bench.benign]
    if arm.purpose == "harden":
        return _share(told(SUCCEEDED)[0].refused), max(
            gone(after.complied, before.complied) for after, before in benign
        )
    refused = [after.complied[:, before.refused[0] == 1] for after, before in benign]
    return _share(np.concatenate(refused, 1)), max(
        gone(after.refused, before.refused) for after, before in map(told, bench.harmful)
    )


def _share(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else 0.0
