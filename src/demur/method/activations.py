"""Activations of SAE features on prompts, under whatever interventions are open on the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.method.attribution import SCORED, ScoredTokens
from demur.model import SCORED_REGIONS, Batch, ChatModel, Items, Region
from demur.saes import DenseSae, FeatureRows, Rows, Sae, Suite
from demur.types import FeatureId, by_layer

_BLOCK = 8192
"""Features encoded at a time."""

Reduce = Literal["max", "mean", "last", "rate"]
"""What is taken over a prompt's scored tokens: a feature's maximum, mean or last activation, or how often it fires."""


def feature_activations(
    model: ChatModel, suite: Suite, items: Items, features: Sequence[FeatureId]
) -> list[Float[Tensor, "pos feature"]]:
    """Activation of each feature at every token of each prompt (float32, on the CPU), in the order of `items` and of
    `features`; padding is left out and only the features' rows are read."""
    wanted = by_layer(features)
    rows = {layer: suite[layer].rows(indices).to(model.layer_device(layer)) for layer, indices in wanted.items()}

    def run(batch: Batch) -> list[Tensor]:
        with torch.inference_mode(), model.capture(tuple(wanted), sites=suite.reads) as residuals:
            model.last_logits(batch)
            encoded = {layer: rows[layer].encode(residuals[layer]).float().cpu() for layer in wanted}
        columns = [encoded[layer][..., wanted[layer].index(index)] for layer, index in features]
        values, real = torch.stack(columns, -1), batch.real.cpu()
        return [values[row][real[row]] for row in range(len(batch))]

    return model.each(items, run)


def over_regions(
    items: Items,
    values: Sequence[Float[Tensor, "_ *feature"]],
    regions: Sequence[Region] = SCORED_REGIONS,
    reduce: Literal["max", "mean"] = "max",
) -> Float[np.ndarray, "prompt *feature"]:
    """Maximum or mean of activations by token (as of `feature_activations`) over each prompt's tokens of some regions;
    0 where it has none."""
    inside = (each[torch.from_numpy(np.isin(i.regions, regions))] for i, each in zip(items, values, strict=True))
    rows = [(each.mean(0) if reduce == "mean" else each.amax(0)) if len(each) else each.sum(0) for each in inside]
    return torch.stack(rows).double().numpy() if rows else np.zeros((0, 0))


@dataclass(frozen=True)
class TokenActivations:
    """Activations of some features at every token of some prompts: what other runs can be held at."""

    features: tuple[FeatureId, ...]
    by_prompt: Mapping[str, Float[Tensor, "pos feature"]]
    """Prompt id → one row for each token of the prompt, in the order of `features`."""

    def of(self, prompt_id: str, features: Sequence[FeatureId]) -> Float[Tensor, "pos k"]:
        """Activations of some of the features on one prompt, in the order asked for."""
        return self.by_prompt[prompt_id][:, [self.features.index(feature) for feature in features]]

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values to write to a run folder."""
        tensors = {str(n): values.contiguous() for n, values in enumerate(self.by_prompt.values())}
        return tensors, {"features": [list(each) for each in self.features], "prompts": list(self.by_prompt)}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        features = tuple(FeatureId(*each) for each in meta["features"])
        return cls(features, {prompt: tensors[str(n)] for n, prompt in enumerate(meta["prompts"])})


def mean_activations(
    model: ChatModel,
    suite: Suite,
    items: Items,
    *,
    layers: Sequence[int] | None = None,
    reduce: Reduce = "mean",
    scoring: ScoredTokens = SCORED,
) -> dict[int, Float[Tensor, " d_sae"]]:
    """Mean over prompts of each feature's mean, maximum or last activation over the scored tokens, by layer (default:
    every layer of the suite). Whole dictionaries are encoded, in blocks; nothing dense over positions is kept."""

    def read(layer: int, residual: Tensor, batch: Batch) -> Tensor:
        blocks = dictionary_blocks(suite[layer])
        return torch.cat([_over_tokens(block, residual, scoring.mask(batch), reduce).cpu() for block in blocks], -1)

    return model.mean_over(items, suite.layers if layers is None else layers, read, suite.reads)


def firing_rates(
    model: ChatModel, suite: Suite, items: Items, *, layers: Sequence[int] | None = None, scoring: ScoredTokens = SCORED
) -> dict[int, Float[Tensor, " d_sae"]]:
    """Mean over prompts of the share of scored tokens on which each feature is active, by layer."""
    return mean_activations(model, suite, items, layers=layers, reduce="rate", scoring=scoring)


def mean_max_activations(
    model: ChatModel, suite: Suite, items: Items, features: Sequence[FeatureId], *, scoring: ScoredTokens = SCORED
) -> Float[Tensor, " feature"]:
    """Mean over prompts of each feature's maximum activation over the scored tokens, in the order of `features`; only
    their rows are read."""
    wanted = by_layer(features)
    rows = {layer: suite[layer].rows(indices) for layer, indices in wanted.items()}

    def read(layer: int, residual: Tensor, batch: Batch) -> Tensor:
        return _over_tokens(rows[layer], residual, scoring.mask(batch), "max")

    means = model.mean_over(items, wanted, read, suite.reads)
    return torch.stack([means[layer][wanted[layer].index(index)] for layer, index in features])


def dictionary_blocks(sae: Sae) -> Iterator[FeatureRows | DenseSae]:
    """A whole dictionary in blocks of features, or in one where a feature is active only against all others (TopK)."""
    if sae.spec.activation == "topk":
        yield sae.dense()
    else:
        yield from sae.encoder_blocks(_BLOCK)


def _over_tokens(
    block: Rows | DenseSae, residual: Float[Tensor, "batch pos _"], scored: Bool[Tensor, "batch pos"], reduce: Reduce
) -> Float[Tensor, "batch k"]:
    values = block.to(residual.device).encode(residual)
    if reduce == "last":
        return values[:, -1]
    scored = scored.to(residual.device)
    if reduce == "max":
        # Activations are never negative, so a masked 0 cannot win a maximum that matters.
        return (values * scored[..., None]).amax(1)
    return mean_within((values > 0).float() if reduce == "rate" else values, scored)


def mean_within(values: Float[Tensor, "batch pos k"], where: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch k"]:
    """Mean of each row's values over its tokens within a mask; 0 where it has none."""
    where = where.to(values.device)
    return (values * where[..., None]).sum(1) / where.sum(1, keepdim=True).clamp(min=1)
