"""Answers watched while they are written: one dot product a token, in the pass that writes them.

A row is stopped when its running score, that of the mean residual over the last few answer tokens, passes the
threshold. The token that passes it, and what was sampled after it, is not part of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.errors import InputError
from demur.guard.probes import Probe
from demur.model import Batch, ChatModel, Cursor


@dataclass(frozen=True, eq=False)
class Stream:
    """A dense probe of the mean residual over a window of the last `window` answer tokens (fewer at the beginning), and
    the log-odds above which an answer is stopped."""

    probe: Probe
    window: int
    threshold: float

    def __post_init__(self) -> None:
        if self.probe.reading.kind != "dense" or self.probe.unit:
            raise InputError("a streaming probe reads the residual of one layer, not scaled")
        if self.window < 1:
            raise InputError(f"a window holds at least one token, not {self.window}")

    @property
    def layer(self) -> int:
        """The layer that is read."""
        return self.probe.reading.layers[0]

    def running(self, residuals: Float[np.ndarray, "token d_model"]) -> Float[np.ndarray, " token"]:
        """The running score, in log-odds, after each token of an answer whose residuals are at hand."""
        dots = residuals.astype(np.float64) @ self.probe.weights.astype(np.float64)
        sums = np.concatenate([[0.0], np.cumsum(dots)])
        ends = np.arange(1, len(dots) + 1)
        starts = np.maximum(ends - self.window, 0)
        return (sums[ends] - sums[starts]) / (ends - starts) + self.probe.bias


@dataclass
class Watch:
    """The running scores of a batch of answers. Tokens after an answer's end are scored as well, and mean nothing."""

    stream: Stream
    n_prompt: int
    """Slots of the prompts, padding among them."""
    rows: int
    device: torch.device
    """Where the answers' tokens are."""
    dots: list[Float[Tensor, " batch"]] = field(default_factory=list[Tensor])
    """`weights · x` of each answer token, on the CPU."""
    cut: list[int | None] = field(default_factory=list[int | None])

    def __post_init__(self) -> None:
        self.cut = [None] * self.rows

    def stopped(self) -> Bool[Tensor, " batch"]:
        return torch.tensor([place is not None for place in self.cut], device=self.device)

    def released(self) -> Sequence[int | None]:
        return tuple(self.cut)

    def see(self, weights: Float[Tensor, " d_model"], residual: Tensor, cursor: Cursor) -> Tensor:
        """Read the answer tokens of one pass; the residual stays as it is."""
        first = max(self.n_prompt - cursor.start, 0)
        for slot in range(first, residual.shape[1]):
            self.dots.append((residual[:, slot].float() @ weights).cpu())
            window = torch.stack(self.dots[-self.stream.window :])
            over = window.mean(0) + self.stream.probe.bias > self.stream.threshold
            for row in over.nonzero().flatten().tolist():
                if self.cut[row] is None:
                    self.cut[row] = len(self.dots) - 1
        return residual


@contextmanager
def watched(model: ChatModel, stream: Stream, batch: Batch) -> Iterator[Watch]:
    """Watch the answers to a batch, with a hook on the probe's layer, while the context is open."""
    watch = Watch(stream, batch.input_ids.shape[1], len(batch), batch.input_ids.device)
    weights = torch.from_numpy(stream.probe.weights).to(model.layer_device(stream.layer))
    with model.edited({stream.layer: [partial(watch.see, weights)]}):
        yield watch
