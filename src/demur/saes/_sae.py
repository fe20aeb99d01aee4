"""One SAE: lazily on disk (`Sae`), or whole in memory (`DenseSae`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import SaeError
from demur.saes import _saving
from demur.saes._array_files import Arrays, Which, memory_array
from demur.saes._canonical import Convention, SaeWeights
from demur.saes._features import ActivationName, FeatureRows, Features, Rows, SaeSpec, TopKRows, keep_top

_DENSE_BLOCK = 4096
_CHECKED_BYTES = 1 << 26


class Sae:
    """One layer's SAE. Its file is fetched and opened when weights are first asked for, and never held whole.

    Weights that are read are checked to be finite; see `check_file` for those that are not.

    Args:
        spec: what is known of it without its weights.
        open_weights: finds its arrays.
        is_here: whether `open_weights` needs no download.
    """

    def __init__(
        self, spec: SaeSpec, open_weights: Callable[[], SaeWeights], *, is_here: Callable[[], bool] = lambda: True
    ) -> None:
        self.spec = spec
        self._open = open_weights
        self._is_here = is_here

    @cached_property
    def _weights(self) -> SaeWeights:
        weights = self._open()
        if (weights.d_model, weights.d_sae) != (self.spec.d_model, self.spec.d_sae):
            raise SaeError(
                f"{weights.file} holds an SAE of {weights.d_sae} features over d_model {weights.d_model}; "
                f"its name or configuration says {self.spec.d_sae} features over d_model {self.spec.d_model}"
            )
        return weights

    def check_file(self) -> None:
        """Check the file, unless it is still to be downloaded: the headers against its size and the shapes against each
        other; that biases and thresholds are finite, and in SAEs of up to 64 MiB (float32) encoder and decoder too.

        Raises:
            SaeError: the file is truncated or malformed, or holds NaN or infinity.
        """
        if self._is_here():
            self._weights.check(everything=8 * self.spec.d_model * self.spec.d_sae <= _CHECKED_BYTES)

    def rows(self, indices: Sequence[int]) -> Rows:
        """The chosen features, in the order given; only their numbers are read.

        Returns:
            `FeatureRows`, or for a TopK dictionary `TopKRows`, which holds the layer's whole encoder.

        Raises:
            SaeError: an index is no feature of this SAE; the file is malformed or not finite there.
        """
        chosen = tuple(int(index) for index in indices)
        for index in chosen:
            if not 0 <= index < self.spec.d_sae:
                raise SaeError(
                    f"layer {self.spec.layer} has features 0 to {self.spec.d_sae - 1}, not {index} ({self.spec.source})"
                )
        if self.spec.activation != "topk":
            return self._feature_rows(chosen)
        w_enc, b_enc = self._encoder()
        return TopKRows(
            layer=self.spec.layer,
            indices=chosen,
            w_enc=w_enc[:, list(chosen)],
            b_enc=b_enc[list(chosen)],
            threshold=None,
            w_dec=self._weights.decoder_rows(chosen),
            top=self.spec.k or 0,
            dictionary_w_enc=w_enc,
            dictionary_b_enc=b_enc,
        )

    def decoder_blocks(self, size: int) -> Iterator[tuple[int, Float[Tensor, "rows d_model"]]]:
        """The decoder in order, at most `size` rows at a time: (index of the first row, rows)."""
        for block in _blocks(self.spec.d_sae, size):
            yield block.start, self._weights.decoder_rows(block)

    def encoder_blocks(self, size: int) -> Iterator[FeatureRows]:
        """The dictionary in order, at most `size` features at a time.

        Raises:
            SaeError: the dictionary is TopK, whose features cannot be encoded apart from each other.
        """
        if self.spec.activation == "topk":
            raise SaeError(
                f"layer {self.spec.layer} has a TopK dictionary ({self.spec.source}): a block of it cannot "
                "be encoded without the rest; use dense() or rows()"
            )
        return (self._feature_rows(block) for block in _blocks(self.spec.d_sae, size))

    def dense(self) -> DenseSae:
        """The whole SAE in memory: `8 · d_model · d_sae` bytes."""
        w_enc, b_enc = self._encoder()
        w_dec = torch.empty(self.spec.d_sae, self.spec.d_model)
        for start, rows in self.decoder_blocks(_DENSE_BLOCK):
            w_dec[start : start + len(rows)] = rows
        return DenseSae(
            layer=self.spec.layer,
            w_enc=w_enc,
            b_enc=b_enc,
            threshold=self._weights.thresholds(range(self.spec.d_sae)),
            k=self.spec.k,
            w_dec=w_dec,
            b_dec=self._weights.decoder_bias(),
        )

    def _feature_rows(self, which: Which) -> FeatureRows:
        w_enc, b_enc = self._weights.encoder_rows(which)
        return FeatureRows(
            layer=self.spec.layer,
            indices=tuple(which),
            w_enc=w_enc.T,
            b_enc=b_enc,
            threshold=self._weights.thresholds(which),
            w_dec=self._weights.decoder_rows(which),
        )

    def _encoder(self) -> tuple[Float[Tensor, "d_model d_sae"], Float[Tensor, " d_sae"]]:
        w_enc = torch.empty(self.spec.d_model, self.spec.d_sae)
        b_enc = torch.empty(self.spec.d_sae)
        for block in _blocks(self.spec.d_sae, _DENSE_BLOCK):
            columns, biases = self._weights.encoder_rows(block)
            w_enc[:, block.start : block.stop] = columns.T
            b_enc[block.start : block.stop] = biases
        return w_enc, b_enc


def _blocks(total: int, size: int) -> Iterator[range]:
    if size < 1:
        raise SaeError(f"a block must hold at least one feature, not {size}")
    return (range(start, min(start + size, total)) for start in range(0, total, size))


@dataclass(frozen=True)
class DenseSae(Features):
    """A whole SAE in memory, canonical and float32."""

    k: int | None
    """Features active per token of a TopK dictionary; None for the others."""
    b_dec: Float[Tensor, " d_model"]

    @property
    def activation(self) -> ActivationName:
        if self.k is not None:
            return "topk"
        return "relu" if self.threshold is None else "jumprelu"

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """All activations, float32 whatever the dtype of `x`; gradients flow through."""
        return super().encode(x) if self.k is None else keep_top(x.float() @ self.w_enc + self.b_enc, self.k)

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction of the residual, float32."""
        return f.float() @ self.w_dec + self.b_dec

    def sae(self, *, average_l0: float | None = None, identity: str | None = None) -> Sae:
        """This SAE behind the interface of one on disk, so that suites can be made without files.

        Args:
            average_l0: mean number of active features per token, where known.
            identity: key of the content; default: of all numbers, which costs a hash over them.
        """
        spec = SaeSpec(
            layer=self.layer,
            d_model=self.w_enc.shape[0],
            d_sae=self.w_enc.shape[1],
            activation=self.activation,
            k=self.k,
            source="memory",
            average_l0=average_l0,
            identity=identity or f"memory:{self.digest()}",
        )
        name = f"layer {self.layer} in memory"
        arrays = Arrays(name, {key: memory_array(name, key, tensor) for key, tensor in self.tensors.items()})
        return Sae(spec, lambda: SaeWeights.of(arrays, Convention(self.activation, self.k)))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The numbers as files name them: `W_enc`, `b_enc`, `W_dec`, `b_dec`, and `threshold` where there is one."""
        found = {"W_enc": self.w_enc, "b_enc": self.b_enc, "W_dec": self.w_dec, "b_dec": self.b_dec}
        return found if self.threshold is None else found | {"threshold": self.threshold}

    def digest(self) -> str:
        """SHA-256 of the numbers, hex."""
        state = hashlib.sha256(f"{self.layer} {self.activation} {self.k}".encode())
        for name, tensor in self.tensors.items():
            state.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return state.hexdigest()

    def save_gemma_scope(self, folder: Path | str, *, average_l0: float) -> Path:
        """Write `folder/layer_L/width_W/average_l0_N/params.npz`, as Gemma Scope does, and return its path.

        `folder` is the suite's, shared by all layers. The same weights give the same bytes.

        Raises:
            SaeError: the dictionary is TopK, which this layout cannot hold.
        """
        return _saving.gemma_scope(self, Path(folder), average_l0)

    def save_saelens(self, folder: Path | str, *, model_name: str = "") -> Path:
        """Write `cfg.json` and `sae_weights.safetensors` into `folder`, as SAELens does, and return `folder`.

        One folder per layer; a suite is a folder of such folders.
        """
        return _saving.saelens(self, Path(folder), model_name)
