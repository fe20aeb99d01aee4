"""Writers of every layout for the tests of the readers, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

D_MODEL, D_SAE = 6, 16


def random_weights(seed: int, d_model: int = D_MODEL, d_sae: int = D_SAE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(d_model, d_sae, generator=generator),
        "W_dec": torch.randn(d_sae, d_model, generator=generator),
        "b_enc": torch.randn(d_sae, generator=generator),
        "b_dec": torch.randn(d_model, generator=generator),
        "threshold": torch.rand(d_sae, generator=generator),
    }


def gemma_scope(root: Path, layer: int, l0: int, *, width: str = "16", dtype: str = "f4", seed: int = 0, lower: bool = False) -> Path:  # fmt: skip  # noqa: E501
    folder = root / f"layer_{layer}" / f"width_{width}" / f"average_l0_{l0}"
    folder.mkdir(parents=True)
    weights = random_weights(seed)
    arrays = {n.replace("W_", "w_") if lower else n: t.numpy().astype(dtype) for n, t in weights.items()}
    np.savez(folder / "params.npz", allow_pickle=False, **arrays)
    return folder / "params.npz"


def gemma_scope_2(root: Path, name: str, *, config: dict[str, Any] | None = None, seed: int = 0) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    weights = random_weights(seed)
    save_file({n.lower(): t for n, t in weights.items()}, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(
            json.dumps({"architecture": "jump_relu", "model_name": "gemma-v3-1b-it"} | config)
        )
    return folder


def llama_scope(root: Path, layer: int, *, seed: int = 0, **changes: Any) -> Path:
    folder = root / f"Llama3_1-8B-Base-L{layer}R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    weights = random_weights(seed)
    tensors = {
        "encoder.weight": weights["W_enc"].T,
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T,
        "decoder.bias": weights["b_dec"],
    }
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "checkpoints" / "final.safetensors")
    parameters = {
        "d_model": D_MODEL,
        "d_sae": D_SAE,
        "hook_point_in": f"blocks.{layer}.hook_resid_post",
        "hook_point_out": f"blocks.{layer}.hook_resid_post",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.75,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 1.25, "out": 1.25},
    } | changes
    (folder / "hyperparams.json").write_text(json.dumps(parameters))
    return folder


def saelens(root: Path, config: dict[str, Any], **tensors: torch.Tensor | None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    weights = random_weights(0)
    if config.get("architecture") != "jumprelu":
        del weights["threshold"]
    both = weights | tensors
    save_file({name: tensor for name, tensor in both.items() if tensor is not None}, root / "sae_weights.safetensors")
    whole = {
        "architecture": "standard",
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.3.hook_resid_post", "model_name": "m"},
    } | config
    (root / "cfg.json").write_text(json.dumps({name: v for name, v in whole.items() if v is not None}))
    return root
