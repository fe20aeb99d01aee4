"""The planted model's transcoders as a set that circuit-tracer would load."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from demur.saes import Suite


def write_transcoders(folder: Path, suite: Suite, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "model_name": "planted",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
    } | config
    (folder / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    for layer in suite.layers:
        dense = suite[layer].dense()
        tensors = {"W_enc": dense.w_enc.T, "b_enc": dense.b_enc, "W_dec": dense.w_dec, "b_dec": dense.b_dec}
        save_file({name: each.contiguous() for name, each in tensors.items()}, folder / f"layer_{layer}.safetensors")
    return folder
