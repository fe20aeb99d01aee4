"""What a probe looks at: residuals or SAE features of a prompt, pooled over its tokens, from one forward pass.

The pass ends after the deepest layer that is asked for. Only the user's words and the template's tokens after them are
read, never BOS, header or padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import model_validator
from torch import Tensor

from demur.errors import InputError
from demur.method.attribution import SCORED
from demur.model import Batch, ChatModel, Progress, Region
from demur.saes import Rows, Suite
from demur.types import FeatureField, Prompt, Value, by_layer

Pooling = Literal["last", "instruction", "mean", "max"]
"""The last post-instruction token (the last token of the prompt), the last token of the user's words, or the mean or
maximum over the user's words and the template's tokens after them."""

Values = Float[np.ndarray, "prompt dim"]
"""What one reading gives, float32."""

Several = list[Float[np.ndarray, "prompt _"]]
"""What several readings give, one array each, whose widths differ."""

_BLOCK = 8192
"""Features encoded at a time."""

RowSource = Callable[[int, tuple[int, ...]], Rows]
"""Layer and indices → encoder rows, in the order of the indices."""


class Reading(Value):
    """What is read of a prompt: the residual after `layer` (`dense`), or the activations of `features`, pooled."""

    kind: Literal["dense", "features"]
    layer: int | None = None
    features: tuple[FeatureField, ...] = ()
    pooling: Pooling = "last"

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.kind == "dense" and (self.layer is None or self.features):
            raise ValueError("a dense reading has a layer, and no features")
        if self.kind == "features" and (self.layer is not None or not self.features):
            raise ValueError("a reading of features has at least one feature, and no layer of its own")
        return self

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that it reads, ascending."""
        return (self.layer,) if self.layer is not None else tuple(sorted(by_layer(self.features)))


def rows_of(suite: Suite | Mapping[int, Rows]) -> RowSource:
    """Encoder rows from a suite, or from rows that are at hand (which hold every index that is asked for)."""
    if isinstance(suite, Suite):
        return lambda layer, indices: suite[layer].rows(indices)

    def chosen(layer: int, indices: tuple[int, ...]) -> Rows:
        return picked(suite[layer], [suite[layer].indices.index(index) for index in indices])

    return chosen


def picked(rows: Rows, places: Sequence[int]) -> Rows:
    """Some of the rows, by their place."""
    keep = list(places)
    threshold = None if rows.threshold is None else rows.threshold[keep]
    return replace(
        rows,
        w_enc=rows.w_enc[:, keep],
        b_enc=rows.b_enc[keep],
        threshold=threshold,
        w_dec=rows.w_dec[keep],
        indices=tuple(rows.indices[place] for place in keep),
    )


class Reader:
    """Gives several readings of prompts from one pass over them. `layers` are the layers that are read, ascending;
    the pass ends after the last one. Raises InputError: a reading asks for a layer that the model does not have."""

    def __init__(
        self, model: ChatModel, readings: Iterable[Reading], suite: Suite | Mapping[int, Rows] | None = None
    ) -> None:
        if isinstance(suite, Suite) and suite.reads:
            raise InputError(f"probes read SAEs of the residual stream; {suite.source} holds transcoders")
        self.model, self.readings = model, tuple(readings)
        self.layers = tuple(sorted({layer for reading in self.readings for layer in reading.layers}))
        if self.layers and self.layers[-1] >= model.n_layers:
            raise InputError(f"layer {self.layers[-1]} is to be read, but {model.name} has 0 to {model.n_layers - 1}")
        self._blocks: dict[tuple[int, tuple[int, ...]], list[Rows]] = {}
        for reading in self.readings:
            for layer, indices in by_layer(reading.features).items():
                if suite is None:
                    raise InputError("features are to be read, but no SAEs are given")
                if (layer, indices) not in self._blocks:
                    self._blocks[layer, indices] = self._load(rows_of(suite), layer, indices)

    def _load(self, source: RowSource, layer: int, indices: tuple[int, ...]) -> list[Rows]:
        device = self.model.layer_device(layer)
        first = source(layer, indices[:_BLOCK])
        # A TopK dictionary is encoded whole for any one feature, so blocks would repeat that.
        size = len(indices) if hasattr(first, "top") else _BLOCK
        parts = (indices[start : start + size] for start in range(0, len(indices), size))
        return [source(layer, part).to(device) for part in parts]

    def read(self, prompts: Iterable[Prompt | str], progress: Progress = None) -> Several:
        """One float32 array `[prompt, dim]` for each reading, prompts in their order; interventions that are open act.
        Raises InputError: a prompt does not fit the model's context."""
        items = self.model.tokenize(prompts)
        rows = self.model.each(items, lambda batch: list(zip(*self.batch(batch), strict=True)), progress)
        if not rows:
            return [np.zeros((0, self._width(reading)), dtype=np.float32) for reading in self.readings]
        return [np.stack(values) for values in zip(*rows, strict=True)]

    def batch(self, batch: Batch) -> Several:
        """The same for one batch, rows in the batch's order."""
        residuals = self.model.residuals(batch, self.layers)
        with torch.no_grad():
            return [self.of(residuals, batch, reading).cpu().numpy() for reading in self.readings]

    def of(
        self, residuals: Mapping[int, Float[Tensor, "batch pos d_model"]], batch: Batch, reading: Reading
    ) -> Float[Tensor, "batch dim"]:
        """One reading from residuals that are at hand."""
        scored = SCORED.mask(batch)
        if reading.layer is not None:
            return pooled(residuals[reading.layer], scored, batch.regions, reading.pooling)
        wanted = by_layer(reading.features)
        found = {
            layer: self._features(residuals[layer], batch, layer, indices, reading.pooling)
            for layer, indices in wanted.items()
        }
        places = {layer: {index: n for n, index in enumerate(indices)} for layer, indices in wanted.items()}
        if len(wanted) == 1:
            return next(iter(found.values()))
        return torch.stack([found[layer][:, places[layer][index]].cpu() for layer, index in reading.features], 1)

    def _features(
        self, residual: Tensor, batch: Batch, layer: int, indices: tuple[int, ...], pooling: Pooling
    ) -> Float[Tensor, "batch k"]:
        scored = SCORED.mask(batch)
        pool = partial(pooled, scored=scored, regions=batch.regions, pooling=pooling)
        blocks = self._blocks[layer, indices]
        if pooling in ("last", "instruction"):
            # One token is read, so one token is encoded.
            one = pool(residual)
            return torch.cat([block.encode(one) for block in blocks], -1)
        return torch.cat([pool(block.encode(residual)) for block in blocks], -1)

    def _width(self, reading: Reading) -> int:
        return self.model.d_model if reading.layer is not None else len(reading.features)


def pooled(
    values: Float[Tensor, "batch pos dim"],
    scored: Bool[Tensor, "batch pos"],
    regions: Int[Tensor, "batch pos"],
    pooling: Pooling,
) -> Float[Tensor, "batch dim"]:
    """Values at one token, or their mean or maximum over the scored ones (float32). Where the user said nothing, the
    last token stands for the last one of the user's words."""
    device = values.device
    scored, regions = scored.to(device), regions.to(device)
    if pooling in ("last", "instruction"):
        words = (regions == Region.INSTRUCTION) & scored
        wanted = torch.where(words.any(1, keepdim=True), words, scored) if pooling == "instruction" else scored
        slots = torch.arange(values.shape[1], device=device)
        place = torch.where(wanted, slots, -1).amax(1)
        return values[torch.arange(len(values), device=device), place].float()
    values, inside = values.float(), scored[..., None]
    if pooling == "max":
        return values.masked_fill(~inside, -torch.inf).amax(1)
    return (values * inside).sum(1) / inside.sum(1)


def read_prompts(
    model: ChatModel,
    prompts: Iterable[Prompt | str],
    readings: Sequence[Reading],
    suite: Suite | Mapping[int, Rows] | None = None,
    progress: Progress = None,
) -> Several:
    """One float32 array `[prompt, dim]` for each reading, from one pass over the prompts; see `Reader`."""
    return Reader(model, readings, suite).read(prompts, progress)
