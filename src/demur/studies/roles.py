"""Harm features and refusal features: which of F* read the request, and which act where the answer begins.

Harm is encoded on the user's words and refusal on the template's tokens after them (Zhao et al., 2025; paper, section
4.2). So a feature's role is read off where its activations tell refused harmful prompts from answered harmless ones.
What suppressing it does is measured apart, by the studies that need it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np

from demur.stats import Estimate, bootstrap_of
from demur.types import FeatureField, FeatureId, Value

if TYPE_CHECKING:
    from demur.model import Items
    from demur.studies.pipeline import Finding, Found

_LEAST = 0.01
"""A harm feature has at least this share of the best one's effect; far below it there is rounding only."""

Role = Literal["harm", "refusal", "mixed"]


class FeatureRole(Value):
    """A feature's role, and where its activation tells the classes apart.

    `instruction` and `post_instruction` are its mean maximum activation on harmful prompts less that on harmless ones,
    over the tokens of that region, in the SAE's units. `share` is the part of the sum that is on post-instruction
    tokens: its interval lies below one half for a harm feature, above for a refusal feature, else the role is mixed. It
    is nan where harmful prompts activate the feature no more than harmless ones.
    """

    feature: FeatureField
    role: Role
    instruction: float
    post_instruction: float
    share: Estimate


class Roles(Value):
    """The roles of a set of features, in its order."""

    features: tuple[FeatureRole, ...]

    def of(self, *roles: Role) -> tuple[FeatureId, ...]:
        """Features with one of these roles."""
        return tuple(row.feature for row in self.features if row.role in roles)


def find_roles(work: Finding, found: Found, features: Iterable[FeatureId] | None = None) -> Roles:
    """The role of each feature (default: of F*), from the selection prompts on which the labels hold."""
    wanted = found.chosen.features if features is None else tuple(features)
    used = found.clean.used("selection")

    def compute() -> Roles:
        harmful, harmless = (_maxima(work, work.model.tokenize(each), wanted) for each in (used.harmful, used.harmless))
        rows = (_role(feature, harmful[:, n], harmless[:, n]) for n, feature in enumerate(wanted))
        return Roles(features=tuple(rows))

    depends = {"prompts": [used.harmful.digest, used.harmless.digest], "features": wanted}
    return work.cached("roles", depends, Roles, compute, "roles")


def harm_features(work: Finding, found: Found, k: int = 20) -> Roles:
    """The `k` harm features with the largest effect on refusal, best first: attribution of taking each feature out, on
    the user's words of the selection prompts, over whole dictionaries; those that fire elsewhere are left out. The pool
    of F* holds few of them: the direction is read after the request, where refusal is."""
    from demur.method.attribution import ScoredTokens
    from demur.model import Region
    from demur.studies.pipeline import Attributor

    harmful, words = found.clean.used("selection").harmful, ScoredTokens(regions=(Region.INSTRUCTION,))
    scored = Attributor(work, found.clean, found.direction).dictionary(harmful, to_zero=True, scoring=words).overall
    best = tuple(
        f for f, score in zip(scored.features, scored.scores, strict=True) if score > _LEAST * scored.scores[0]
    )
    rows = [row for row in find_roles(work, found, best).features if row.role == "harm"]
    return Roles(features=tuple(rows[:k]))


def _maxima(work: Finding, items: Items, features: tuple[FeatureId, ...]) -> np.ndarray:
    """Maximum activation over the tokens of each region, shape (prompt, feature, 2): instruction, post-instruction."""
    from demur.method.activations import feature_activations, over_regions
    from demur.model import SCORED_REGIONS

    values = feature_activations(work.model, work.suite, items, features)
    return np.stack([over_regions(items, values, [region]) for region in SCORED_REGIONS], -1)


def _role(feature: FeatureId, harmful: np.ndarray, harmless: np.ndarray) -> FeatureRole:
    def share(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        gaps = np.clip(high - low, 0, None)
        total = gaps.sum(-1)
        return np.divide(gaps[..., 1], total, out=np.full_like(total, np.nan), where=total > 0)

    estimate = bootstrap_of(share, harmful, harmless)
    told = not np.isnan(estimate.value)
    role: Role = "harm" if told and estimate.high < 0.5 else "refusal" if told and estimate.low > 0.5 else "mixed"
    gaps = harmful.mean(0) - harmless.mean(0)
    return FeatureRole(
        feature=feature, role=role, instruction=float(gaps[0]), post_instruction=float(gaps[1]), share=estimate
    )
