"""Pairwise interactions of many features from what random subsets of them do: a factorisation machine (Rendle, 2010).

Suppressing a subset has an effect. An additive fit gives each feature a share of it; a factorisation machine adds, for
each two features that are both in the subset, the product of their factors. It needs far fewer measurements than there
are pairs, as long as the interactions are of low rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.stats import Estimate, bootstrap_of

_RIDGE = 1e-3
"""Penalty on squared weights, relative to the effects' variance."""
_HELD_OUT = 4
"""Every so many random subsets is held out."""

Members = Bool[np.ndarray, "subset feature"]
Effects = Float[np.ndarray, " subset"]


@dataclass(frozen=True)
class FactorisationMachine:
    """`effect(S) = Σ w_i + Σ_{i<j} Σ_f ±v_if v_jf` over the features of a subset; that of none is 0. The factors of the
    second half count negatively: without them a low rank could not hold many features that stand in for each other."""

    weights: Float[Tensor, " feature"]
    factors: Float[Tensor, "feature rank"]

    @property
    def pairs(self) -> Float[np.ndarray, "feature feature"]:
        """The interaction of each two features; 0 on the diagonal."""
        table = (self.factors * _signs(self.factors.shape[1])) @ self.factors.T
        return (table - table.diag().diag()).numpy()

    def __call__(self, members: Members) -> Effects:
        return _predicted(torch.from_numpy(members).double(), self.weights, self.factors).numpy()


def _signs(rank: int) -> Float[Tensor, " rank"]:
    return torch.tensor([1.0 if f < (rank + 1) // 2 else -1.0 for f in range(rank)])


def _predicted(members: Tensor, weights: Tensor, factors: Tensor) -> Tensor:
    # Σ_{i<j} v_i v_j x_i x_j = ½ ((Σ v_i x_i)² − Σ v_i² x_i²)
    crossed = (members @ factors).square() - members.square() @ factors.square()
    return members @ weights + 0.5 * (crossed * _signs(factors.shape[1])).sum(-1)


def fit(members: Members, effects: Effects, rank: int, *, seed: int = 0, starts: int = 2) -> FactorisationMachine:
    """The machine with the smallest penalised squared error of several starts; of rank 0 an additive fit."""
    x, scale = torch.from_numpy(members).double(), float(np.std(effects)) or 1.0
    y = torch.from_numpy(effects).double() / scale
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(starts if rank else 1):
        weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
        factors = 0.1 * torch.randn(x.shape[1], rank, generator=generator, dtype=torch.float64)
        factors.requires_grad_()
        optimiser = torch.optim.LBFGS([weights, factors], max_iter=200, line_search_fn="strong_wolfe")

        def loss(w: Tensor = weights, v: Tensor = factors) -> Tensor:
            penalty = _RIDGE * (w.square().sum() + v.square().sum())
            return (_predicted(x, w, v) - y).square().mean() + penalty / x.shape[1]

        def closure(o: torch.optim.Optimizer = optimiser, of: Callable[[], Tensor] = loss) -> Tensor:
            o.zero_grad()
            value = of()
            value.backward()
            return value

        with torch.enable_grad():
            optimiser.step(closure)
        if best is None or float(loss().detach()) < best[0]:
            best = float(loss().detach()), weights.detach() * scale, factors.detach() * scale**0.5
    assert best is not None
    return FactorisationMachine(*best[1:])


@dataclass(frozen=True)
class Interactions:
    """What a machine that was fitted to all subsets says of each pair, and how well machines fitted to some predict the
    effects of others: the share of their variance that is explained, with an interval over subsets."""

    pairs: Float[np.ndarray, "feature feature"]
    r2: Estimate
    additive_r2: Estimate
    gain: Estimate
    """The machine's share less the additive fit's, on the same subsets."""


def draw_subsets(features: int, count: int, *, seed: int = 0) -> Members:
    """Each feature alone, and `count` random subsets of two features to half of all."""
    random = np.random.default_rng(seed)
    rows = np.zeros((features + count, features), dtype=bool)
    rows[:features] = np.eye(features)
    for row in rows[features:]:
        row[random.permutation(features)[: random.integers(2, max(2, features // 2) + 1)]] = True
    return rows


def find_interactions(members: Members, effects: Effects, rank: int, *, seed: int = 0) -> Interactions:
    """Interactions from the effects of subsets, as `draw_subsets` gives them. Every fourth of those with more than one
    feature is held out to measure the fit, and used again for the interactions that are given."""
    several = np.flatnonzero(members.sum(1) > 1)
    tested = several[::_HELD_OUT]
    known = np.setdiff1d(np.arange(len(members)), tested)
    truth = effects[tested]
    errors = [
        (truth - fit(members[known], effects[known], each, seed=seed)(members[tested])) ** 2 for each in (rank, 0)
    ]
    table = np.stack([*errors, (truth - truth.mean()) ** 2], 1)
    r2, additive, gain = (
        bootstrap_of(statistic, table)
        for statistic in (
            lambda m: 1 - m[:, 0] / m[:, 2],
            lambda m: 1 - m[:, 1] / m[:, 2],
            lambda m: (m[:, 1] - m[:, 0]) / m[:, 2],
        )
    )
    return Interactions(fit(members, effects, rank, seed=seed).pairs, r2, additive, gain)
