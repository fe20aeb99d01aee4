"""From the arrays of a file to the canonical form `f = act(x w_enc + b_enc)`, `x̂ = f w_dec + b_dec`.

A layout says which array is which and under which `Convention` they were trained. Everything is folded into the
weights here, once, the same way for two features as for the whole dictionary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import SaeError
from demur.saes._array_files import Arrays, NamedArray, Which
from demur.saes._features import ActivationName

_CHECKED = 4096
"""Features checked at a time."""


@dataclass(frozen=True)
class Convention:
    """How the arrays of a file are to be used: `f = act((scale·x − centred·b_dec) w_enc + b_enc)` and
    `x̂ = (f w_dec + b_dec) / scale`.

    Attributes:
        activation: `relu`, `jumprelu` or `topk`.
        k: features active per token, for `topk` only.
        centred: `b_dec` is subtracted from the input.
        scale: the input is multiplied by it, and the output divided.
        unit_decoder: the activation sees pre-activations times the norm of their decoder row, and the decoder's rows
            are used with unit norm.
        threshold: one JumpReLU threshold for all features, in units of what the activation sees, for files that hold
            no thresholds.
    """

    activation: ActivationName = "jumprelu"
    k: int | None = None
    centred: bool = False
    scale: float = 1.0
    unit_decoder: bool = False
    threshold: float | None = None


@dataclass(frozen=True)
class SaeWeights:
    """One SAE's arrays, features first, and their convention. Shapes are checked when it is made.

    Attributes:
        file: for error messages.
        encoder: `d_sae d_model`.
        decoder: `d_sae d_model`.
        b_enc: `d_sae`; None: zeros.
        b_dec: `d_model`; None: zeros.
        threshold: JumpReLU thresholds, `d_sae`, or one for all features.
        threshold_is_log: `threshold` holds their logarithms.

    Raises:
        SaeError: shapes do not fit each other, or `k` does not fit the number of features.
    """

    file: str
    encoder: NamedArray
    decoder: NamedArray
    b_enc: NamedArray | None
    b_dec: NamedArray | None
    convention: Convention
    threshold: NamedArray | None = None
    threshold_is_log: bool = False

    @classmethod
    def of(cls, arrays: Arrays, convention: Convention) -> SaeWeights:
        """The arrays under their usual names, in upper or lower case.

        `W_enc` (`d_model d_sae`), `W_dec` (`d_sae d_model`), `b_enc`, `b_dec`; for JumpReLU `threshold`,
        `log_threshold`, or the `topk_threshold` of a batchtopk checkpoint (one for all features).

        Raises:
            SaeError: one of them is missing, or there is a `scaling_factor` other than 1.
        """
        named = Arrays(arrays.file, {name.lower(): array for name, array in arrays.items()})
        if "scaling_factor" in named and bool((named["scaling_factor"].whole() != 1).any()):
            raise SaeError(f"{arrays.file} has a finetuning scaling_factor, which has no canonical form")
        threshold = None
        if convention.activation == "jumprelu" and convention.threshold is None:
            names = ("threshold", "log_threshold", "topk_threshold")
            threshold = next((named[name] for name in names if name in named), None)
            if threshold is None:
                raise SaeError(
                    f"{arrays.file} has none of {', '.join(names)}. Without it, which features of a batchtopk SAE are "
                    "active depends on the rest of the batch: save it for inference with SAELens, as a jumprelu SAE."
                )
        return cls(
            file=arrays.file,
            encoder=named["w_enc"].T,
            decoder=named["w_dec"],
            b_enc=named["b_enc"],
            b_dec=named["b_dec"],
            convention=convention,
            threshold=threshold,
            threshold_is_log=threshold is not None and threshold.name.lower() == "log_threshold",
        )

    def __post_init__(self) -> None:
        for array in (self.encoder, self.decoder):
            if len(array.shape) != 2:
                raise SaeError(f"{self.file}: {array.name} has shape {list(array.shape)}; expected two dimensions")
        self._expect(self.decoder, (self.d_sae, self.d_model))
        self._expect(self.b_enc, (self.d_sae,))
        self._expect(self.b_dec, (self.d_model,))
        if self.threshold is not None and self.threshold.shape != (1,):
            self._expect(self.threshold, (self.d_sae,))
        k = self.convention.k
        if self.convention.activation == "topk" and not (k and 0 < k <= self.d_sae):
            raise SaeError(
                f"{self.file}: a TopK dictionary of {self.d_sae} features needs 0 < k <= {self.d_sae}, not {k}"
            )

    def _expect(self, array: NamedArray | None, shape: tuple[int, ...]) -> None:
        if array is not None and array.shape != shape:
            raise SaeError(
                f"{self.file}: {array.name} has shape {list(array.stored_shape)}; it must be "
                f"{list(array.as_stored(shape))} beside {self.encoder.name} of shape {list(self.encoder.stored_shape)}"
            )

    @property
    def d_model(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_sae(self) -> int:
        return self.encoder.shape[0]

    def decoder_bias(self) -> Float[Tensor, " d_model"]:
        """Canonical `b_dec`."""
        return self._stored_b_dec() / self.convention.scale

    def decoder_rows(self, which: Which) -> Float[Tensor, "k d_model"]:
        """Canonical decoder rows."""
        stored, scale = self.decoder.take(which), self.convention.scale
        if not self.convention.unit_decoder:
            return stored / scale
        norms = _norms(stored)
        # A row of zeros decodes to nothing at any norm; dividing by it would make it NaN.
        return stored / (torch.where(norms > 0, norms, 1.0) * scale)[:, None]

    def encoder_rows(self, which: Which) -> tuple[Float[Tensor, "k d_model"], Float[Tensor, " k"]]:
        """Canonical encoder columns, features first, and their biases.

        Each feature is folded on its own (sums over `d_model` run along contiguous rows in float64), so the numbers do
        not depend on which other features are asked for.
        """
        w_enc = self.encoder.take(which)
        b_enc = self.b_enc.take(which) if self.b_enc else torch.zeros(len(which))
        if self.convention.centred:
            shift = (w_enc.double() * self._stored_b_dec().double()).sum(dim=1)
            b_enc = (b_enc.double() - shift).float()
        w_enc = w_enc * self.convention.scale
        if self.convention.unit_decoder:
            norms = _norms(self.decoder.take(which))
            w_enc, b_enc = w_enc * norms[:, None], b_enc * norms
        return w_enc, b_enc

    def thresholds(self, which: Which) -> Float[Tensor, " k"] | None:
        """Canonical thresholds (None: the activation is not JumpReLU)."""
        if self.convention.activation != "jumprelu":
            return None
        if self.threshold is None:
            values = torch.full((len(which),), self.convention.threshold or 0.0)
        elif self.threshold.shape == (1,):
            values = self.threshold.whole().expand(len(which))
        else:
            values = self.threshold.take(which)
        if self.threshold_is_log:
            values = values.exp()
            if not bool(torch.isfinite(values).all()):
                raise SaeError(f"{self.file}: a log_threshold is above 88, beyond float32; export the file again")
        # JumpReLU is relu(pre) where pre > threshold: below 0 the ReLU decides, so the threshold is 0.
        return values.clamp(min=0)

    def check(self, *, everything: bool) -> None:
        """Read biases and thresholds, with `everything` encoder and decoder too, to see that they are finite.

        Raises:
            SaeError: a value is not; names file, array, index and feature.
        """
        self._stored_b_dec()
        features = range(self.d_sae)
        self.thresholds(features)
        if self.b_enc:
            self.b_enc.take(features)
        for start in range(0, self.d_sae if everything else 0, _CHECKED):
            for array in (self.encoder, self.decoder):
                array.take(features[start : start + _CHECKED])

    def _stored_b_dec(self) -> Float[Tensor, " d_model"]:
        return self.b_dec.whole() if self.b_dec else torch.zeros(self.d_model)


def _norms(rows: Float[Tensor, "k d_model"]) -> Float[Tensor, " k"]:
    return rows.double().square().sum(dim=1).sqrt().float()
