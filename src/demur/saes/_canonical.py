"""The canonical form, float32: `f = act(x w_enc + b_enc)`, `ŷ = f w_dec + b_dec + x w_skip`; and how a file's arrays
come to it. An SAE reads and writes the residual; a transcoder reads an MLP's input and writes the MLP's output, and may
have a linear path beside its features (`w_skip`).

A layout names the arrays and their `Convention`, folded into the weights the same way for two features as for all.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import SaeError
from demur.saes._files import Arrays, NamedArray, Which
from demur.types import Site, Value

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
    """The decoder layer where it reads and writes."""
    reads: Site = "resid_post"
    """What its encoder reads."""
    writes: Site = "resid_post"
    """What it reconstructs. A change of what the MLP adds is the same change of the residual that leaves the layer."""
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
class Encoder:
    """What reads features of a ReLU or JumpReLU dictionary."""

    layer: int
    w_enc: Float[Tensor, "d_model k"]
    b_enc: Float[Tensor, " k"]
    threshold: Float[Tensor, " k"] | None
    """JumpReLU thresholds, never negative; None means ReLU, or TopK in a class that says so."""

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        """Activations, float32 whatever the dtype of `x`; their gradients are the true ones."""
        pre = x.float() @ self.w_enc + self.b_enc
        return torch.relu(pre) if self.threshold is None else pre * (pre > self.threshold)

    def to(self, device: torch.device | str) -> Self:
        """The same values with all tensors on `device`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: each.to(device) for name, each in parts.items() if isinstance(each, Tensor | Encoder)}
        return replace(self, **moved)


@dataclass(frozen=True)
class TopKEncoder(Encoder):
    """The whole encoder of a TopK dictionary: whether a feature is active depends on all the others."""

    top: int
    """Features kept per token."""

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        return keep_top(x.float() @ self.w_enc + self.b_enc, self.top)


@dataclass(frozen=True)
class Features(Encoder):
    """Features of a ReLU or JumpReLU dictionary, with their decoder rows."""

    w_dec: Float[Tensor, "k d_model"]


@dataclass(frozen=True)
class FeatureRows(Features):
    """Chosen features of a dictionary. Reading feature `i` costs one dot product."""

    indices: tuple[int, ...]


@dataclass(frozen=True)
class TopKRows(FeatureRows):
    """Features of a TopK dictionary, with its whole encoder."""

    dictionary: TopKEncoder

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        return self.dictionary.encode(x)[..., list(self.indices)]


Rows = FeatureRows | TopKRows


@dataclass(frozen=True)
class Convention:
    """How arrays are used: `f = act((scale·x − centred·b_dec) w_enc + b_enc)`, `x̂ = (f w_dec + b_dec) / scale`. With
    `unit_decoder` the activation sees pre-activations times the norm of their decoder row, which is used at norm 1."""

    activation: ActivationName = "jumprelu"
    k: int | None = None
    """Features active per token, for `topk` only."""
    centred: bool = False
    scale: float = 1.0
    unit_decoder: bool = False
    threshold: float | None = None
    """One for all features, in units of what the activation sees, for JumpReLU files that hold no thresholds."""


@dataclass(frozen=True)
class SaeWeights:
    """One SAE's arrays, features first, and their convention; SaeError where shapes or `k` do not fit each other.
    Biases that are None are zeros."""

    file: str
    encoder: NamedArray
    decoder: NamedArray
    b_enc: NamedArray | None
    b_dec: NamedArray | None
    convention: Convention
    threshold: NamedArray | None = None
    """JumpReLU thresholds, `d_sae`, or one for all features."""
    threshold_is_log: bool = False
    """They are the logarithms."""
    skip: NamedArray | None = None
    """A transcoder's linear path, `[d_model, d_model]`: read `x` adds `x skip` to the reconstruction."""

    @classmethod
    def of(cls, arrays: Arrays, convention: Convention) -> SaeWeights:
        """The arrays under their usual names, in upper or lower case; SaeError where one is missing.
        `W_enc` (`d_model d_sae`), `W_dec` (`d_sae d_model`), `b_enc`, `b_dec`; for JumpReLU `threshold`,
        `log_threshold`, or the `topk_threshold` of a batchtopk checkpoint (one for all features)."""
        named = Arrays(arrays.file, {name.lower(): array for name, array in arrays.items()})
        if "scaling_factor" in named and bool((named["scaling_factor"].whole() != 1).any()):
            raise SaeError(f"{arrays.file} has a finetuning scaling_factor, which has no canonical form")
        kind, threshold = None, None
        if convention.activation == "jumprelu" and convention.threshold is None:
            kinds = ("threshold", "log_threshold", "topk_threshold")
            kind = next((name for name in kinds if name in named), None)
            if kind is None:
                raise SaeError(
                    f"{arrays.file} has none of {', '.join(kinds)}. Without it, which features of a batchtopk SAE are "
                    "active depends on the rest of the batch: save it for inference with SAELens, as a jumprelu SAE."
                )
            threshold = named[kind]
        encoder, decoder, b_enc, b_dec = (named[name] for name in ("w_enc", "w_dec", "b_enc", "b_dec"))
        log = kind == "log_threshold"
        # The one is stored as inputs by outputs, the other as a linear layer's weight.
        skip = named["w_skip"].T if "w_skip" in named else named.get("affine_skip_connection")
        return cls(arrays.file, encoder.T, decoder, b_enc, b_dec, convention, threshold, log, skip)

    def __post_init__(self) -> None:
        for array in (self.encoder, self.decoder):
            if len(array.shape) != 2:
                raise SaeError(f"{self.file}: {array.name} has shape {list(array.shape)}; expected two dimensions")
        d_sae, d_model, k = self.d_sae, self.d_model, self.convention.k
        one = self.threshold is not None and self.threshold.shape == (1,)
        expected = ((d_sae, d_model), (d_sae,), (d_model,), (1,) if one else (d_sae,), (d_model, d_model))
        arrays = (self.decoder, self.b_enc, self.b_dec, self.threshold, self.skip)
        for array, shape in zip(arrays, expected, strict=True):
            if array is not None and array.shape != shape:
                must = list(shape[::-1] if array.transposed else shape)
                beside = f"beside {self.encoder.name} of shape {list(self.encoder.stored_shape)}"
                has = f"{array.name} has shape {list(array.stored_shape)}"
                raise SaeError(f"{self.file}: {has}; it must be {must} {beside}")
        if self.convention.activation == "topk" and not (k and 0 < k <= d_sae):
            raise SaeError(f"{self.file}: a TopK dictionary of {d_sae} features needs 0 < k <= {d_sae}, not {k}")

    @property
    def d_model(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_sae(self) -> int:
        return self.encoder.shape[0]

    def decoder_bias(self) -> Float[Tensor, " d_model"]:
        return self._stored_b_dec() / self.convention.scale

    def skip_rows(self) -> Float[Tensor, "d_model d_model"] | None:
        return None if self.skip is None else self.skip.whole()

    def decoder_rows(self, which: Which) -> Float[Tensor, "k d_model"]:
        stored, scale = self.decoder.take(which), self.convention.scale
        if not self.convention.unit_decoder:
            return stored if scale == 1 else stored / scale
        norms = _norms(stored)
        # A row of zeros decodes to nothing at any norm; dividing by it would make it NaN.
        return stored / (torch.where(norms > 0, norms, 1.0) * scale)[:, None]

    def encoder_rows(self, which: Which) -> tuple[Float[Tensor, "k d_model"], Float[Tensor, " k"]]:
        """Canonical encoder columns, features first, and their biases. Each feature is folded on its own (sums over
        `d_model` in float64), so the numbers do not depend on which others are asked for."""
        w_enc = self.encoder.take(which)
        b_enc = self.b_enc.take(which) if self.b_enc else torch.zeros(len(which))
        if self.convention.centred:
            shift = (w_enc.contiguous().double() * self._stored_b_dec().double()).sum(dim=1)
            b_enc = (b_enc.double() - shift).float()
        if self.convention.scale != 1:
            w_enc = w_enc * self.convention.scale
        if self.convention.unit_decoder:
            norms = _norms(self.decoder.take(which))
            w_enc, b_enc = w_enc * norms[:, None], b_enc * norms
        return w_enc, b_enc

    def thresholds(self, which: Which) -> Float[Tensor, " k"] | None:
        """None where the activation is not JumpReLU."""
        if self.convention.activation != "jumprelu":
            return None
        if self.threshold is None:
            values = torch.full((len(which),), self.convention.threshold or 0.0)
        else:
            one = self.threshold.shape == (1,)
            values = self.threshold.whole().expand(len(which)) if one else self.threshold.take(which)
        if self.threshold_is_log:
            values = values.exp()
            if not bool(torch.isfinite(values).all()):
                raise SaeError(f"{self.file}: a log_threshold is above 88, beyond float32; export the file again")
        # JumpReLU is relu(pre) where pre > threshold: below 0 the ReLU decides, so the threshold is 0.
        return values.clamp(min=0)

    def check(self) -> None:
        """SaeError where a bias or a threshold is not finite."""
        self._stored_b_dec()
        self.thresholds(range(self.d_sae))
        if self.b_enc:
            self.b_enc.take(range(self.d_sae))

    def _stored_b_dec(self) -> Float[Tensor, " d_model"]:
        return self.b_dec.whole() if self.b_dec else torch.zeros(self.d_model)


def _norms(rows: Float[Tensor, "k d_model"]) -> Float[Tensor, " k"]:
    # One after the other in memory, so that a row's sum does not depend on which others there are.
    return rows.contiguous().double().square().sum(dim=1).sqrt().float()
