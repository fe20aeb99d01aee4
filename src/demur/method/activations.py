"""Activations of SAE features on prompts, under whatever interventions are open on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, Literal, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.method.attribution import SCORED, ScoredTokens
from demur.model import NO_SITES, SCORED_REGIONS, Batch, ChatModel, Items, Region, Sites
from demur.saes import Encoder, Suite
from demur.types import FeatureId, by_layer

BLOCK = 8192
"""Features of a dictionary that are read at a time."""
_VALUES = 1 << 24
"""Activations of a block that are held at once."""
KEPT_BYTES = 1 << 29
"""What is kept of prompts before dictionaries are read, once for all of them."""

Reduce = Literal["max", "mean", "last", "rate"]
"""What is taken over a prompt's scored tokens: a feature's maximum, mean or last activation, or how often it fires."""
_REDUCED: Final[Mapping[Reduce, Callable[[Tensor], Tensor]]] = {
    "max": lambda values: values.amax(0),
    "mean": lambda values: values.mean(0),
    "last": lambda values: values[-1],
    "rate": lambda values: (values > 0).float().mean(0),
}

Kept = dict[int, tuple[Float[Tensor, "token _"], ...]]
"""Layer → what is kept of one prompt's scored tokens."""
Name = TypeVar("Name")
EncoderT = TypeVar("EncoderT", bound=Encoder)


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
    values: Sequence[Float[Tensor, " _ *feature"]],
    regions: Sequence[Region] = SCORED_REGIONS,
    reduce: Literal["max", "mean"] = "max",
) -> Float[np.ndarray, " prompt *feature"]:
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


def dictionary_means(
    model: ChatModel,
    suite: Suite,
    groups: Sequence[Items],
    reduces: Sequence[Reduce],
    *,
    layers: Sequence[int] | None = None,
    scoring: ScoredTokens = SCORED,
) -> tuple[dict[Reduce, dict[int, Float[Tensor, " d_sae"]]], ...]:
    """Mean over the prompts of each group of what is taken of each feature over a prompt's scored tokens (0 where it
    has none), by layer (default: every layer of the suite).

    Residuals at the scored tokens are kept, up to half a gibibyte; then each dictionary is read once for all of them,
    in blocks.
    """
    chosen = tuple(suite.layers if layers is None else layers)

    def zeros() -> dict[int, Tensor]:
        return {layer: torch.zeros(suite[layer].spec.d_sae, dtype=torch.float64) for layer in chosen}

    totals: list[dict[Reduce, dict[int, Tensor]]] = [{name: zeros() for name in reduces} for _ in groups]

    def add(number: int, layer: int, place: slice, values: Sequence[Tensor]) -> None:
        for name, total in totals[number].items():
            if part := [_REDUCED[name](each) for each in values if len(each)]:
                total[layer][place] += torch.stack(part).cpu().double().sum(0)

    every = (
        (number, kept)
        for number, items in enumerate(groups)
        for _, kept in scored_residuals(model, items, chosen, suite.reads, scoring)
    )
    for some in filled(every):
        for layer in chosen:
            for place, block in placed(suite[layer].encoder_blocks(BLOCK), model.layer_device(layer)):
                for number, of_group in groupby(some, itemgetter(0)):
                    for (x,), counts in chunks((kept[layer] for _, kept in of_group), len(block.b_enc)):
                        add(number, layer, place, block.encode(x).split(counts))
    return tuple(
        {name: {layer: (each / len(items)).float() for layer, each in total.items()} for name, total in found.items()}
        for items, found in zip(groups, totals, strict=True)
    )


def scored_residuals(
    model: ChatModel,
    items: Items,
    layers: Sequence[int],
    reads: Sites = NO_SITES,
    scoring: ScoredTokens = SCORED,
) -> Iterator[tuple[str, Kept]]:
    """Prompt id, and what leaves some layers at its scored tokens, or what is at other places of them (`reads`)."""

    def run(batch: Batch) -> list[tuple[str, Kept]]:
        with torch.inference_mode():
            residuals = model.residuals(batch, layers, reads)
        mask = scoring.mask(batch)
        return by_prompt(batch, {layer: [x[mask.to(x.device)]] for layer, x in residuals.items()}, mask)

    return (each for _, part in model.over_batches(items, run) for each in part)


def by_prompt(
    batch: Batch, values: Mapping[int, Sequence[Float[Tensor, "tokens _"]]], mask: Bool[Tensor, "batch pos"]
) -> list[tuple[str, Kept]]:
    """What a batch has at the scored tokens, of one prompt after the other: prompt id, and its own part."""
    parts = {layer: [x.split(mask.sum(1).tolist()) for x in each] for layer, each in values.items()}
    return [
        (prompt, {layer: tuple(x[row] for x in each) for layer, each in parts.items()})
        for row, prompt in enumerate(batch.prompt_ids)
    ]


def placed(blocks: Iterable[EncoderT], device: torch.device) -> Iterator[tuple[slice, EncoderT]]:
    """Blocks of a dictionary on a device, each with its place among all features."""
    start = 0
    for block in blocks:
        stop = start + len(block.b_enc)
        yield slice(start, stop), block.to(device)
        start = stop


def filled(prompts: Iterable[tuple[Name, Kept]]) -> Iterator[list[tuple[Name, Kept]]]:
    """Prompts in order, as many at a time as may be kept."""
    some: list[tuple[Name, Kept]] = []
    size = 0
    for name, kept in prompts:
        some.append((name, kept))
        size += sum(each.nbytes for parts in kept.values() for each in parts)
        if size >= KEPT_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def chunks(
    prompts: Iterable[Sequence[Float[Tensor, "token _"]]], width: int
) -> Iterator[tuple[list[Float[Tensor, "tokens _"]], list[int]]]:
    """What is kept of several prompts, each part of it joined, and how many tokens each prompt has: as many at a time
    as a block of `width` features may be encoded at."""
    some: list[Sequence[Tensor]] = []
    tokens = 0
    for parts in prompts:
        if some and (tokens + len(parts[0])) * width > _VALUES:
            yield _joined(some)
            some, tokens = [], 0
        some.append(parts)
        tokens += len(parts[0])
    if some:
        yield _joined(some)


def _joined(prompts: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[int]]:
    return [torch.cat(each) for each in zip(*prompts, strict=True)], [len(parts[0]) for parts in prompts]


def mean_activations(
    model: ChatModel, suite: Suite, items: Items, *, reduce: Reduce = "mean", **options: Any
) -> dict[int, Float[Tensor, " d_sae"]]:
    """`dictionary_means` of one group of prompts, of one kind."""
    return dictionary_means(model, suite, [items], [reduce], **options)[0][reduce]


def feature_means(
    model: ChatModel,
    suite: Suite,
    items: Items,
    features: Sequence[FeatureId],
    reduces: Sequence[Reduce],
    *,
    scoring: ScoredTokens = SCORED,
) -> dict[Reduce, Float[Tensor, " feature"]]:
    """As `dictionary_means` of some features, in the order of `features`; only their rows are read."""
    wanted = by_layer(features)
    rows = {layer: suite[layer].rows(indices).to(model.layer_device(layer)) for layer, indices in wanted.items()}
    totals: dict[Reduce, Tensor] = {name: torch.zeros(len(features), dtype=torch.float64) for name in reduces}

    def run(batch: Batch) -> tuple[Tensor, ...]:
        mask = scoring.mask(batch)
        with torch.inference_mode():
            residuals = model.residuals(batch, tuple(wanted), suite.reads)
            encoded = {layer: rows[layer].encode(x[mask.to(x.device)]).cpu() for layer, x in residuals.items()}
        columns = [encoded[layer][:, wanted[layer].index(index)] for layer, index in features]
        return torch.stack(columns, -1).split(mask.sum(1).tolist())

    for _, prompts in model.over_batches(items, run):
        for values in prompts:
            for name, total in totals.items():
                total += _REDUCED[name](values).double() if len(values) else 0.0
    return {name: (total / len(items)).float() for name, total in totals.items()}


def mean_max_activations(
    model: ChatModel, suite: Suite, items: Items, features: Sequence[FeatureId], *, scoring: ScoredTokens = SCORED
) -> Float[Tensor, " feature"]:
    """Mean over prompts of each feature's maximum activation over the scored tokens, in the order of `features`; only
    their rows are read."""
    return feature_means(model, suite, items, features, ["max"], scoring=scoring)["max"]


def mean_within(values: Float[Tensor, "batch pos k"], where: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch k"]:
    """Mean of each row's values over its tokens within a mask; 0 where it has none."""
    where = where.to(values.device)
    return (values * where[..., None]).sum(1) / where.sum(1, keepdim=True).clamp(min=1)
