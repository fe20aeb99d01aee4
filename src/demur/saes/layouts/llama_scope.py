"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`, JumpReLU with one threshold.

The SAE was trained on residuals scaled from their mean norm (in the hyperparameters) to `sqrt(d_model)`. The factor is
folded into encoder, decoder and threshold as SAELens does, so that feature values agree with it.
"""

from __future__ import annotations

import math
import re

from demur.errors import SaeError
from demur.saes.layouts import Arrays, Convention, FoundSae, HookError, Layout, SaeFiles, SaeWeights, residual_layer


def _describe(files: SaeFiles, match: re.Match[str]) -> FoundSae:
    config = files.config(match[0])
    hook = config.text("hook_point_in")
    layer = residual_layer(hook, config.file)
    if config.get("hook_point_out") not in (None, hook):
        raise HookError(f"{config.file} is a transcoder to {config.get('hook_point_out')}; demur needs SAEs")
    if config.get("act_fn") not in (None, "jumprelu"):
        raise SaeError(f"{config.file}: act_fn is {config.get('act_fn')!r}; Llama Scope's SAEs are jumprelu")
    d_model, d_sae = config.integer("d_model"), config.integer("d_sae")
    scale = math.sqrt(d_model) / config.number("dataset_average_activation_norm.in")
    convention = Convention(
        centred=bool(config.get("apply_decoder_bias_to_pre_encoder")),
        scale=scale,
        threshold=config.number("jump_relu_threshold") * scale,
    )
    weights = f"{match[1] or ''}checkpoints/final.safetensors"
    return FoundSae(files, weights, layer, convention, d_model, d_sae, hook, read=_read)


def _read(arrays: Arrays, convention: Convention) -> SaeWeights:
    encoder, decoder = arrays["encoder.weight"], arrays["decoder.weight"].T
    return SaeWeights(arrays.file, encoder, decoder, arrays["encoder.bias"], arrays["decoder.bias"], convention)


LLAMA_SCOPE = Layout(
    "Llama Scope (hyperparams.json + checkpoints/final.safetensors)", r"(.*/)?hyperparams\.json", _describe
)
