"""Features of two dictionaries, or of two sets of one, put beside each other: by decoder cosine and by activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from demur.saes import Suite
from demur.types import FeatureId, by_layer


def unit_rows(
    suite: Suite, features: Sequence[FeatureId]
) -> tuple[Float[Tensor, "feature d_model"], Float[Tensor, " feature"]]:
    """Decoder rows at length 1 (float32, on the CPU), and their lengths, in the order of `features`."""
    rows: dict[FeatureId, Tensor] = {}
    for layer, indices in by_layer(features).items():
        found = suite[layer].rows(indices).w_dec.float().cpu()
        rows |= {FeatureId(layer, index): row for index, row in zip(indices, found, strict=True)}
    if not features:
        return torch.zeros(0, 0), torch.zeros(0)
    stacked = torch.stack([rows[feature] for feature in features])
    norms = stacked.norm(dim=-1)
    return stacked / norms.clamp(min=1e-12)[:, None], norms


class Match(NamedTuple):
    """Two features that are nearest to each other in both directions, by place, and how near."""

    first: int
    second: int
    score: float


def mutual_nearest(scores: Float[Tensor, "first second"]) -> list[Match]:
    """Pairs each of which is the other's best; the highest score first."""
    if 0 in scores.shape:
        return []
    right, left = scores.argmax(1).tolist(), scores.argmax(0).tolist()
    found = [Match(a, b, float(scores[a, b])) for a, b in enumerate(right) if left[b] == a]
    return sorted(found, key=lambda match: -match.score)
