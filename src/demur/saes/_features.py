"""The chosen features of one layer, in canonical form: `f = act(x w_enc + b_enc)`, `x̂ = f w_dec + b_dec`, float32."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from demur.types import Value

ActivationName = Literal["relu", "jumprelu", "topk"]


def width_name(d_sae: int) -> str:
    """`d_sae` as Gemma Scope writes it: `16k` for 16,384, `1m` for 1,048,576; other numbers in full."""
    if d_sae >= 1024 and d_sae.bit_count() == 1:
        return f"{d_sae // 1_000_000}m" if d_sae >= 1_000_000 else f"{d_sae // 1000}k"
    return str(d_sae)


_WIDTHS = {width_name(1 << power): 1 << power for power in range(10, 24)}


def width_number(name: str) -> int | None:
    """The number of features that a width name stands for; None when it stands for none."""
    return int(name) if name.isdigit() else _WIDTHS.get(name.lower())


class SaeSpec(Value):
    """What is known of one SAE before its weights are read."""

    layer: int
    """The decoder layer whose output (`resid_post`) the SAE reads."""
    d_model: int
    d_sae: int
    activation: ActivationName
    k: int | None = None
    """Features active per token, for `topk` only."""
    hook: str = "resid_post"
    """Where the SAE was trained, in the file's own words where it has any."""
    source: str
    """Folder or hub repository and path, for people to read."""
    average_l0: float | None = None
    """Mean number of active features per token, as the file or its name states it."""
    identity: str
    """Key of the content, for the hashes of runs: equal for equal weights at the same place."""


def keep_top(pre: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """Per token the `k` largest pre-activations, negative ones as 0; everything else 0."""
    values, where = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, where, torch.relu(values))


@dataclass(frozen=True)
class Features:
    """Features of a ReLU or JumpReLU dictionary."""

    layer: int
    w_enc: Float[Tensor, "d_model k"]
    b_enc: Float[Tensor, " k"]
    threshold: Float[Tensor, " k"] | None
    """JumpReLU thresholds, never negative; None means ReLU, or TopK in a class that says so."""
    w_dec: Float[Tensor, "k d_model"]

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        """Activations, float32 whatever the dtype of `x`; their gradients are the true ones."""
        pre = x.float() @ self.w_enc + self.b_enc
        return torch.relu(pre) if self.threshold is None else pre * (pre > self.threshold)

    def to(self, device: torch.device | str) -> Self:
        """The same values with all tensors on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: each.to(device) for name, each in tensors.items() if isinstance(each, Tensor)})


@dataclass(frozen=True)
class FeatureRows(Features):
    """Chosen features of a dictionary. Reading feature `i` costs one dot product."""

    indices: tuple[int, ...]


@dataclass(frozen=True)
class TopKRows(FeatureRows):
    """Features of a TopK dictionary, with its whole encoder: whether one is active depends on all the others. `encode`
    costs `d_sae / k` times that of `FeatureRows`."""

    top: int
    """Features kept per token."""
    dictionary_w_enc: Float[Tensor, "d_model d_sae"]
    dictionary_b_enc: Float[Tensor, " d_sae"]

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        pre = x.float() @ self.dictionary_w_enc + self.dictionary_b_enc
        return keep_top(pre, self.top)[..., list(self.indices)]


Rows = FeatureRows | TopKRows
