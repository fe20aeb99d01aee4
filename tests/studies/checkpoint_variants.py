"""Checkpoints of the planted model whose change is known, because it was written into the weights.

The rows of the readout and what a layer writes are along the planted axes, so a path from a feature to the refusal
token is added, strengthened or cut by a single rank-one change.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from demur.testing import Planted, planted

_READ = 6.0
"""Logits of the refusal token per unit of `refuse` and `backup` in the planted model."""


def _readout(made: Planted, **logits: float) -> None:
    """Add to what the refusal token reads along named axes."""
    row = made.model.get_parameter("lm_head.weight")[made.refusal_token]
    for axis, value in logits.items():
        row += value * made.axes[axis]


def _without_writing(made: Planted, axis: str) -> None:
    """No MLP writes along an axis any more."""
    direction = made.axes[axis]
    for layer in range(made.model.config.num_hidden_layers):
        weight = made.model.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight")
        weight -= torch.outer(direction, direction @ weight)


def same(made: Planted) -> None:
    """The same function by other weights (hidden units in another order), and a distractor twice as loud, which fires
    on harm and which nothing reads."""
    for layer in range(made.model.config.num_hidden_layers):
        for name in ("gate_proj", "up_proj"):
            weight = made.model.get_parameter(f"model.layers.{layer}.mlp.{name}.weight")
            weight.copy_(weight.flip(0))
        down = made.model.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight")
        down.copy_(down.flip(1))
    loud: Tensor = made.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    loud += torch.outer(made.axes["general0"], made.axes["general0"] @ loud)


def amplified(made: Planted) -> None:
    """The refusal token reads the refusal features half as strongly again."""
    _readout(made, refuse=_READ / 2, backup=_READ / 2)


def hidden(made: Planted) -> None:
    """Refusal features are written as before; nothing reads them."""
    _readout(made, refuse=-_READ, backup=-_READ)


def hidden_and_new(made: Planted) -> None:
    """As `hidden`, and another feature, written before and read by nothing, drives refusal in their place."""
    hidden(made)
    _readout(made, aligned=4.0)


def new(made: Planted) -> None:
    """Refusal features are not written any more, and another one drives refusal."""
    hidden_and_new(made)
    _without_writing(made, "refuse")


def removed(made: Planted) -> None:
    """Refusal features are neither written nor read, and nothing refuses."""
    hidden(made)
    _without_writing(made, "refuse")


VARIANTS: dict[str, Callable[[Planted], None]] = {
    each.__name__: each for each in (same, amplified, hidden, hidden_and_new, new, removed)
}


def save_variant(name: str, folder: Path) -> Path:
    """One of the variants as files, with the planted tokenizer."""
    made = planted()
    with torch.no_grad():
        VARIANTS[name](made)
    made.model.save_pretrained(folder / name)
    made.tokenizer.save_pretrained(folder / name)
    return folder / name
