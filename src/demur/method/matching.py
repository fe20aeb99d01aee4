"""Features of two dictionaries, or of two sets of one, put beside each other: by decoder cosine and by activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from demur.method.activations import BLOCK, chunks, filled, placed, scored_residuals
from demur.model import ChatModel, Items
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


class Nearest(NamedTuple):
    """For each of some features its best counterpart in another dictionary's SAE of the same layer (None: there is no
    such SAE), the score, and whether the feature is that one's best in turn."""

    others: tuple[FeatureId | None, ...]
    scores: tuple[float, ...]
    mutual: tuple[bool, ...]


Best = Callable[[Suite, Suite, Sequence[FeatureId]], tuple[dict[FeatureId, FeatureId], dict[FeatureId, float]]]
"""Each feature's best in the second suite and its score; features of layers without an SAE there are left out."""


def nearest(first: Suite, second: Suite, features: Sequence[FeatureId], best: Best) -> Nearest:
    """Counterparts of features of one suite in another one of the same model, by `best`, asked in both directions."""
    found, scores = best(first, second, features)
    back, _ = best(second, first, tuple(dict.fromkeys(found.values())))
    others = tuple(found.get(feature) for feature in features)
    return Nearest(
        others,
        tuple(scores.get(feature, math.nan) for feature in features),
        tuple(other is not None and back[other] == each for each, other in zip(features, others, strict=True)),
    )


def by_cosine(
    first: Suite, second: Suite, features: Sequence[FeatureId]
) -> tuple[dict[FeatureId, FeatureId], dict[FeatureId, float]]:
    """A `Best`: the highest decoder cosine. Decoders are streamed."""

    def scores(layer: int, indices: Sequence[int]) -> Tensor:
        rows, _ = unit_rows(first, [FeatureId(layer, index) for index in indices])
        blocks = (block.float().cpu() for _, block in second[layer].decoder_blocks(BLOCK))
        return torch.cat([rows @ (b / b.norm(dim=-1, keepdim=True).clamp(min=1e-12)).T for b in blocks], 1)

    return _best(second, features, scores)


def by_correlation(model: ChatModel, items: Items) -> Best:
    """A `Best`: the highest correlation of activations over the scored tokens of some prompts. A feature that never
    changes there correlates with none. Whole dictionaries are encoded, in blocks."""

    def best(
        first: Suite, second: Suite, features: Sequence[FeatureId]
    ) -> tuple[dict[FeatureId, FeatureId], dict[FeatureId, float]]:
        return _best(
            second, features, lambda layer, indices: _correlations(model, items, first, second, layer, indices)
        )

    return best


def _best(
    second: Suite, features: Sequence[FeatureId], scores: Callable[[int, Sequence[int]], Float[Tensor, "k d_sae"]]
) -> tuple[dict[FeatureId, FeatureId], dict[FeatureId, float]]:
    found: dict[FeatureId, FeatureId] = {}
    known: dict[FeatureId, float] = {}
    for layer, indices in by_layer(features).items():
        if layer not in second:
            continue
        values, places = scores(layer, indices).max(1)
        for index, value, place in zip(indices, values.tolist(), places.tolist(), strict=True):
            found[FeatureId(layer, index)], known[FeatureId(layer, index)] = FeatureId(layer, place), value
    return found, known


def _correlations(
    model: ChatModel, items: Items, first: Suite, second: Suite, layer: int, indices: Sequence[int]
) -> Float[Tensor, "k d_sae"]:
    """Correlation over all scored tokens of some features with every feature of the other suite's SAE."""
    rows = first[layer].rows(indices).to(model.layer_device(layer))
    # Sums over tokens: of a and a², b and b², and ab.
    first_sums = torch.zeros(2, len(indices), dtype=torch.float64)
    second_sums = torch.zeros(2, second[layer].spec.d_sae, dtype=torch.float64)
    products = torch.zeros(len(indices), second[layer].spec.d_sae, dtype=torch.float64)
    n = 0
    for some in filled(scored_residuals(model, items, [layer])):
        for place, block in placed(second[layer].encoder_blocks(BLOCK), model.layer_device(layer)):
            for (x,), _ in chunks((kept[layer] for _, kept in some), len(block.b_enc)):
                a, b = (each.encode(x).cpu().double() for each in (rows, block))
                second_sums[:, place] += torch.stack([b.sum(0), b.square().sum(0)])
                products[:, place] += a.T @ b
                if place.start == 0:
                    first_sums += torch.stack([a.sum(0), a.square().sum(0)])
                    n += len(x)
    covariance = products - torch.outer(first_sums[0], second_sums[0]) / n
    spreads = [(squares - total**2 / n).clamp(min=0).sqrt() for total, squares in (first_sums, second_sums)]
    scale = torch.outer(*spreads)
    return torch.where(scale > 1e-9, covariance / scale.clamp(min=1e-12), 0.0).float()
