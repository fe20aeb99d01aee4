"""One SAE: lazily on disk (`Sae`), or whole in memory (`DenseSae`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from demur.errors import SaeError
from demur.saes._canonical import (
    ActivationName,
    Convention,
    Encoder,
    FeatureRows,
    Features,
    Rows,
    SaeSpec,
    SaeWeights,
    TopKEncoder,
    TopKRows,
    keep_top,
    width_name,
)
from demur.saes._files import Arrays, Which, memory_array
from demur.types import Site

_DENSE_BLOCK = 4096
_CHECKED_BYTES = 1 << 26
_SAELENS_FORMAT = "6.0.0"
"""The SAELens release whose configuration format is written."""


class Sae:
    """One layer's SAE. Its file is fetched and opened (`open_weights`) when weights are first asked for, and never held
    whole; what is read is checked to be finite. `is_here` says whether opening it needs no download."""

    def __init__(
        self, spec: SaeSpec, open_weights: Callable[[], SaeWeights], *, is_here: Callable[[], bool] = lambda: True
    ) -> None:
        self.spec, self._open, self._is_here = spec, open_weights, is_here

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
        """SaeError where the file is here and is truncated or malformed, or holds NaN or infinity in biases or
        thresholds, or, in SAEs of up to 64 MiB (float32), in encoder or decoder."""
        if self._is_here():
            self._weights.check()
            if 8 * self.spec.d_model * self.spec.d_sae <= _CHECKED_BYTES:
                for block in _blocks(self.spec.d_sae, _DENSE_BLOCK):
                    self._feature_rows(block)

    def rows(self, indices: Sequence[int]) -> Rows:
        """The chosen features, in the order given; only their numbers, and a TopK dictionary's encoder, are read."""
        chosen = tuple(int(index) for index in indices)
        for index in chosen:
            if not 0 <= index < self.spec.d_sae:
                there = f"layer {self.spec.layer} has features 0 to {self.spec.d_sae - 1}"
                raise SaeError(f"{there}, not {index} ({self.spec.source})")
        rows = self._feature_rows(chosen)
        if self.spec.activation != "topk":
            return rows
        return TopKRows(**vars(rows), dictionary=self._topk_encoder())

    def decoder_blocks(self, size: int) -> Iterator[tuple[int, Float[Tensor, "rows d_model"]]]:
        """The decoder in order, at most `size` rows at a time: (index of the first row, rows)."""
        for block in _blocks(self.spec.d_sae, size):
            yield block.start, self._weights.decoder_rows(block)

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """The length of every decoder row; the decoder is read in blocks."""
        return torch.cat([rows.norm(dim=-1) for _, rows in self.decoder_blocks(_DENSE_BLOCK)])

    def encoder_blocks(self, size: int) -> Iterator[Encoder]:
        """The encoder in order, at most `size` features at a time; a TopK dictionary's in one piece. Decoder rows are
        not read."""
        if self.spec.activation == "topk":
            yield self._topk_encoder()
        else:
            yield from map(self._encoder_rows, _blocks(self.spec.d_sae, size))

    def blocks(self, size: int) -> Iterator[Features]:
        """The dictionary in order, at most `size` features at a time; a TopK dictionary in one piece."""
        if self.spec.activation == "topk":
            yield self.dense()
        else:
            yield from map(self._feature_rows, _blocks(self.spec.d_sae, size))

    def dense(self) -> DenseSae:
        """The whole SAE in memory: `8 · d_model · d_sae` bytes."""
        w_enc, b_enc = self._encoder()
        w_dec = torch.empty(self.spec.d_sae, self.spec.d_model)
        for start, rows in self.decoder_blocks(_DENSE_BLOCK):
            w_dec[start : start + len(rows)] = rows
        thresholds = self._weights.thresholds(range(self.spec.d_sae))
        known = (self.spec.k, self._weights.decoder_bias(), self._weights.skip_rows())
        spec = self.spec
        return DenseSae(spec.layer, w_enc, b_enc, thresholds, w_dec, *known, reads=spec.reads, writes=spec.writes)

    def _feature_rows(self, which: Which) -> FeatureRows:
        encoder = self._encoder_rows(which)
        return FeatureRows(**vars(encoder), w_dec=self._weights.decoder_rows(which), indices=tuple(which))

    def _encoder_rows(self, which: Which) -> Encoder:
        w_enc, b_enc = self._weights.encoder_rows(which)
        return Encoder(self.spec.layer, w_enc.T, b_enc, self._weights.thresholds(which))

    def _topk_encoder(self) -> TopKEncoder:
        return TopKEncoder(self.spec.layer, *self._encoder(), threshold=None, top=self.spec.k or 0)

    def _encoder(self) -> tuple[Float[Tensor, "d_model d_sae"], Float[Tensor, " d_sae"]]:
        w_enc, b_enc = torch.empty(self.spec.d_model, self.spec.d_sae), torch.empty(self.spec.d_sae)
        for block in _blocks(self.spec.d_sae, _DENSE_BLOCK):
            columns, biases = self._weights.encoder_rows(block)
            w_enc[:, block.start : block.stop] = columns.T
            b_enc[block.start : block.stop] = biases
        return w_enc, b_enc


def _blocks(total: int, size: int) -> Iterator[range]:
    if size < 1:
        raise SaeError(f"a block must hold at least one feature, not {size}")
    return (range(total)[start : start + size] for start in range(0, total, size))


@dataclass(frozen=True)
class DenseSae(Features):
    """A whole SAE in memory, canonical and float32."""

    k: int | None
    """Features active per token of a TopK dictionary; None for the others."""
    b_dec: Float[Tensor, " d_model"]
    w_skip: Float[Tensor, "d_model d_model"] | None = None
    """A transcoder's linear path from what it reads to what it writes."""
    reads: Site = "resid_post"
    writes: Site = "resid_post"

    @property
    def activation(self) -> ActivationName:
        if self.k is not None:
            return "topk"
        return "relu" if self.threshold is None else "jumprelu"

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        return super().encode(x) if self.k is None else keep_top(x.float() @ self.w_enc + self.b_enc, self.k)

    def decode(
        self, f: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_model"] | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction, float32: of the residual, or by a transcoder of what the MLP adds to it. One with a skip
        connection needs what it read (`x`), else SaeError."""
        made = f.float() @ self.w_dec + self.b_dec
        if self.w_skip is None:
            return made
        if x is None:
            raise SaeError(f"the transcoder of layer {self.layer} has a skip connection: decode with what it read")
        return made + x.float() @ self.w_skip

    def sae(self, *, identity: str | None = None) -> Sae:
        """This SAE behind the interface of one on disk. `identity` is the key of its content; default: `digest`."""
        d_model, d_sae = self.w_enc.shape
        kind, key = self.activation, identity or f"memory:{self.digest()}"
        shape = {"d_model": d_model, "d_sae": d_sae, "activation": kind, "k": self.k}
        where = {"layer": self.layer, "reads": self.reads, "writes": self.writes}
        spec = SaeSpec.model_validate({**where, **shape, "source": "memory", "identity": key})
        name = f"layer {self.layer} in memory"
        arrays = Arrays(name, {key: memory_array(name, key, tensor) for key, tensor in self.tensors.items()})
        return Sae(spec, lambda: SaeWeights.of(arrays, Convention(kind, self.k)))

    def _of_residual(self) -> None:
        if self.reads != "resid_post" or self.writes != "resid_post":
            raise SaeError(f"layer {self.layer} reads {self.reads} and writes {self.writes}; only SAEs are written")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The numbers, on the CPU, under the names that files give them; `threshold` where there is one."""
        named = {"W_enc": self.w_enc, "b_enc": self.b_enc, "W_dec": self.w_dec, "b_dec": self.b_dec}
        named |= {} if self.threshold is None else {"threshold": self.threshold}
        named |= {} if self.w_skip is None else {"affine_skip_connection": self.w_skip}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}

    def digest(self) -> str:
        """SHA-256 of the numbers, hex."""
        where = "" if self.reads == self.writes == "resid_post" else f" {self.reads} {self.writes}"
        state = hashlib.sha256(f"{self.layer} {self.activation} {self.k}{where}".encode())
        for name, tensor in self.tensors.items():
            state.update(name.encode() + tensor.numpy().tobytes())
        return state.hexdigest()

    def save_gemma_scope(self, folder: Path | str, *, average_l0: float) -> Path:
        """Write `folder/layer_L/width_W/average_l0_N/params.npz`, as Gemma Scope does, and return its path. `folder` is
        the suite's, shared by all layers. The same weights give the same bytes. SaeError for TopK and transcoders."""
        self._of_residual()
        if self.activation == "topk":
            raise SaeError("Gemma Scope's layout holds JumpReLU dictionaries; save a TopK dictionary with save_saelens")
        place = f"layer_{self.layer}/width_{width_name(len(self.b_enc))}/average_l0_{round(average_l0)}"
        path = Path(folder) / place / "params.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        # relu(pre) is pre where pre > 0: a JumpReLU with thresholds of 0.
        arrays = {"threshold": torch.zeros(len(self.b_enc))} | self.tensors
        np.savez(path, allow_pickle=False, **{name: tensor.numpy() for name, tensor in arrays.items()})
        return path

    def save_saelens(self, folder: Path | str, *, model_name: str = "") -> Path:
        """Write `cfg.json` and `sae_weights.safetensors` into `folder`, as SAELens does for a layer, and return it.
        SaeError for transcoders."""
        self._of_residual()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        d_in, d_sae = self.w_enc.shape
        architecture = "standard" if self.activation == "relu" else self.activation
        hook, hf_hook = f"blocks.{self.layer}.hook_resid_post", f"model.layers.{self.layer}.output"
        trained = {"model_name": model_name, "hook_name": hook, "hf_hook_name": hf_hook}
        config: dict[str, object] = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32"}
        config |= {"device": "cpu", "apply_b_dec_to_input": False}
        config |= {"normalize_activations": "none", "reshape_activations": "none"}
        config["metadata"] = {"sae_lens_version": _SAELENS_FORMAT, **trained}
        if self.k is not None:
            config |= {"k": self.k, "rescale_acts_by_decoder_norm": False}
        (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(self.tensors, folder / "sae_weights.safetensors")
        return folder
