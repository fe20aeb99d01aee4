"""Writing SAEs in the layouts of Gemma Scope and SAELens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from demur.errors import SaeError
from demur.saes._widths import width_name

if TYPE_CHECKING:
    from demur.saes._sae import DenseSae

_SAELENS_FORMAT = "6.0.0"
"""The SAELens release whose configuration format is written."""


def gemma_scope(sae: DenseSae, folder: Path, average_l0: float) -> Path:
    """Write `params.npz` under `folder/layer_L/width_W/average_l0_N`; see `DenseSae.save_gemma_scope`."""
    if sae.activation == "topk":
        raise SaeError("Gemma Scope's layout holds JumpReLU dictionaries; save a TopK dictionary with save_saelens")
    # relu(pre) is pre where pre > 0: a JumpReLU with thresholds of 0.
    threshold = torch.zeros(len(sae.b_enc))
    place = f"layer_{sae.layer}/width_{width_name(sae.w_enc.shape[1])}/average_l0_{round(average_l0)}"
    path = folder / place / "params.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"threshold": threshold} | _arrays(sae)
    np.savez(path, allow_pickle=False, **{name: tensor.numpy() for name, tensor in arrays.items()})
    return path


def saelens(sae: DenseSae, folder: Path, model_name: str) -> Path:
    """Write `cfg.json` and `sae_weights.safetensors` into `folder`; see `DenseSae.save_saelens`."""
    folder.mkdir(parents=True, exist_ok=True)
    d_in, d_sae = sae.w_enc.shape
    config: dict[str, object] = {
        "architecture": {"relu": "standard"}.get(sae.activation, sae.activation),
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _SAELENS_FORMAT,
            "model_name": model_name,
            "hook_name": f"blocks.{sae.layer}.hook_resid_post",
            "hf_hook_name": f"model.layers.{sae.layer}.output",
        },
    }
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(_arrays(sae), folder / "sae_weights.safetensors")
    return folder


def _arrays(sae: DenseSae) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sae.tensors.items()}
