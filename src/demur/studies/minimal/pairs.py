"""Interactions of two features: every pair, or those that a factorisation machine holds for strongest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from demur.stats import Estimate, bootstrap_mean, holm, sign_flip_p, spearman_over_prompts, wilson
from demur.studies.minimal.sections import PairRow, Screening
from demur.types import FeatureId, PromptSet

if TYPE_CHECKING:
    from demur.studies.context import Change, Context
    from demur.studies.pipeline import Found

_SCREENED = 20
"""Pairs that a factorisation machine holds for strongest, which are then suppressed together."""
_Pair = tuple[FeatureId, FeatureId]


@dataclass(frozen=True)
class Pairs:
    """Pairs of features suppressed alone and together."""

    context: Context[Any]
    found: Found
    odds: Callable[[PromptSet, Change], np.ndarray]
    """Refusal log-odds of each prompt under a change, nats."""
    scaled: Callable[[Sequence[FeatureId]], Change]

    def rows(
        self, chosen: tuple[FeatureId, ...], dormant: Sequence[FeatureId], prompts: PromptSet
    ) -> tuple[tuple[PairRow, ...], Screening | None]:
        """Exact interactions, strongest first: of every pair of F* where there are not too many, else of those of the
        minimal set and of those that a factorisation machine over F* and the `dormant` features holds for strongest."""
        most, features = self.context.config.max_pairs, self.found.chosen.features
        every = {"F*": tuple(combinations(features, 2)), "minimal set": tuple(combinations(chosen, 2))}
        if not len(prompts):
            return (), None
        if len(every["F*"]) <= most:
            return _pair_rows(every["F*"], self._interactions(every["F*"], prompts)), None
        own = every["minimal set"] if len(every["minimal set"]) <= most else ()
        found = self._screened(tuple(dict.fromkeys((*features, *dormant))))
        if found is None:
            return _pair_rows(own, self._interactions(own, prompts)), None
        estimates, fit = found
        strongest = sorted(estimates, key=lambda each: -abs(estimates[each]))[:_SCREENED]
        # The machine's pairs are in another order than the minimal set's.
        own = tuple(pair if pair in estimates else (pair[1], pair[0]) for pair in own)
        pairs = tuple(dict.fromkeys((*own, *strongest)))
        table = self._interactions(pairs, prompts)
        rows = _pair_rows(pairs, table, estimates)
        # The machine itself is checked on the prompts that it was fitted to.
        same = self._screening_prompts
        exact = self._interactions(own, same).T.round(3)
        guess = np.tile([estimates[pair] for pair in own], (len(same), 1))
        named = [row for row in rows if (row.first, row.second) not in own]
        agree = sum((row.estimate or 0.0) * row.interaction.value > 0 for row in named)
        return rows, Screening(
            **fit,
            pairs=len(own),
            spearman=spearman_over_prompts(guess, exact) if len(own) > 1 else Estimate.unknown(),
            same_sign=Estimate.of(wilson(agree, len(named))),
        )

    @property
    def _screening_prompts(self) -> PromptSet:
        return self.found.clean.used("selection").harmful.head(self.context.config.n_pairs)

    def _screened(self, features: tuple[FeatureId, ...]) -> tuple[dict[_Pair, float], dict[str, Any]] | None:
        """Interactions as a factorisation machine has them, on prompts that choose, and how well it fits."""
        from demur.method.interactions import draw_subsets, find_interactions

        config, clean, prompts = self.context.config, self.found.clean, self._screening_prompts
        if not config.fm_draws:
            return None
        members = draw_subsets(len(features), config.fm_draws, seed=config.seed)

        def compute() -> tuple[float, ...]:
            before, effects = self.odds(prompts, ()).mean(), list[float]()
            for row in members:
                suppressed = self.scaled([f for f, inside in zip(features, row, strict=True) if inside])
                effects.append(float(before - self.odds(prompts, suppressed).mean()))
                self.context.progress("random parts of F*", len(effects), len(members))
            return tuple(effects)

        depends = {
            "features": features,
            "prompts": prompts.digest,
            "factor": self.context.config.factor,
            "seed": config.seed,
        }
        depends |= {"draws": config.fm_draws, "refusal_ids": clean.refusal_ids}
        effects = self.context.cached("subsets", depends, tuple[float, ...], compute)
        found = find_interactions(members, np.array(effects), config.fm_rank, seed=config.seed)
        numbered = combinations(enumerate(features), 2)
        estimates = {(a, b): float(found.pairs[m, n]) for (m, a), (n, b) in numbered}
        shape = {"features": len(features), "draws": len(members), "rank": config.fm_rank}
        return estimates, {**shape, "r2": found.r2, "additive": found.additive_r2, "gain": found.gain}

    def _interactions(self, pairs: Sequence[_Pair], prompts: PromptSet) -> np.ndarray:
        """What each pair does beyond the sum of what each of the two does, nats, shape (pair, prompt)."""
        features = tuple(dict.fromkeys(feature for pair in pairs for feature in pair))

        def compute() -> tuple[tuple[float, ...], ...]:
            clean = self.odds(prompts, ())
            alone = {f: clean - self.odds(prompts, self.scaled([f])) for f in features}
            found: list[tuple[float, ...]] = []
            for n, (a, b) in enumerate(pairs, start=1):
                both = clean - self.odds(prompts, self.scaled([a, b]))
                found.append(tuple((both - alone[a] - alone[b]).tolist()))
                self.context.progress("pairs of features", n, len(pairs))
            return tuple(found)

        depends = {"pairs": pairs, "prompts": prompts.digest, "factor": self.context.config.factor}
        depends |= {"refusal_ids": self.found.clean.refusal_ids}
        table = self.context.cached("pairs", depends, tuple[tuple[float, ...], ...], compute) if pairs else ()
        return np.array(table).reshape(len(pairs), len(prompts))


def _pair_rows(
    pairs: Sequence[_Pair], table: np.ndarray, estimates: Mapping[_Pair, float] | None = None
) -> tuple[PairRow, ...]:
    """Interactions, strongest first."""
    adjusted = holm([sign_flip_p(row) for row in table])
    rows = [
        PairRow(
            first=a,
            second=b,
            interaction=bootstrap_mean(row),
            p_holm=p,
            estimate=None if estimates is None else estimates[a, b],
        )
        for (a, b), row, p in zip(pairs, table, adjusted, strict=True)
    ]
    return tuple(sorted(rows, key=lambda row: -abs(row.interaction.value)))
