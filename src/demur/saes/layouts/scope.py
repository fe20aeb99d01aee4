"""Gemma Scope, Gemma Scope 2 and Llama Scope: one file per SAE, JumpReLU.

Llama Scope's were trained on residuals scaled from their mean norm (in the hyperparameters) to `sqrt(d_model)`. The
factor is folded into encoder, decoder and the one threshold as SAELens does, so that feature values agree with it.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath

from demur.errors import SaeError
from demur.saes._canonical import Convention, SaeWeights, width_number
from demur.saes._files import Arrays
from demur.saes.layouts import Config, FoundSae, HookError, Layout, SaeFiles, mlp_sites, residual_layer

_RELEASE = re.compile(r"gemma-scope-(\w+)-(?:pt|it)-(\w+)")
_D_MODEL = {"2b": 2304, "9b": 3584, "27b": 4608}
_RELEASE_2 = re.compile(r"gemma-scope-2-(\d+[mb])-(?:pt|it)")
_D_MODEL_2 = {"270m": 640, "1b": 1152, "4b": 2560, "12b": 3840, "27b": 5376}
_NOMINAL_L0 = {"small": 20.0, "medium": 60.0, "big": 150.0}
"""Where there is no `config.json`: the release's figures for its middle layers."""


def _d_model(files: SaeFiles, file: str, release: re.Match[str] | None, known: dict[str, int]) -> int | None:
    """Known of a release by its name; a file that is here is opened to see."""
    return known.get(release[1]) if release and not files.is_here(file) else None


def _describe(files: SaeFiles, match: re.Match[str]) -> FoundSae:
    release = _RELEASE.search(files.name)
    if release and release[2] != "res":
        raise HookError(
            f"{files.name} holds SAEs of {release[2]!r} activations; demur needs those of the residual stream: "
            f"{release[0].removesuffix(release[2])}res"
        )
    d_model, d_sae = _d_model(files, match[0], release, _D_MODEL), width_number(match[2])
    return FoundSae(files, match[0], int(match[1]), d_model=d_model, d_sae=d_sae, average_l0=float(match[3]))


def _describe_2(files: SaeFiles, match: re.Match[str]) -> FoundSae:
    site = match["site"] or PurePosixPath(files.name).name
    if not site.startswith(("resid_post", "transcoder")):
        where = f"{files.name}/{match[0]} is of {site}"
        raise HookError(
            f"{where}; demur takes the SAEs under resid_post_all or resid_post, and the transcoders under "
            "transcoder_all or transcoder"
        )
    layer, d_sae = int(match["layer"]), width_number(match["width"])
    d_model = _d_model(files, match[0], _RELEASE_2.search(files.name), _D_MODEL_2)
    average_l0 = partial(_average_l0, files, match, layer)
    found = FoundSae(files, match[0], layer, d_model=d_model, d_sae=d_sae, average_l0=average_l0)
    return found if site.startswith("resid_post") else replace(found, hook=site, reads="mlp_in", writes="mlp_out")


def _average_l0(files: SaeFiles, match: re.Match[str], layer: int) -> float | None:
    """From `config.json`, as what small, medium and big stand for differs between layers."""
    name = f"{match['folder']}/config.json"
    config = files.config(name) if name in files.files else Config(name, {})
    hook = config.get("hf_hook_point_in")
    if hook is not None and _layer_of(config, str(hook)) != layer:
        raise SaeError(f"{config.file}: hf_hook_point_in is {hook!r}, but the folder is of layer {layer}")
    return config.number("l0") if config.get("l0") is not None else _NOMINAL_L0.get(match["size"])


def _layer_of(config: Config, hook: str) -> int:
    """The layer that a configuration names, its hooks checked."""
    if config.get("type") != "transcoder" and "feedforward" not in hook:
        return residual_layer(hook, config.file)
    if mlp_sites(hook, config.text("hf_hook_point_out"), config.file) != ("mlp_in", "mlp_out"):
        raise HookError(f"{config.file}: a Gemma Scope 2 transcoder reads the MLP's input, not {hook!r}")
    return int(re.findall(r"layers\.(\d+)\.", hook)[0])


GEMMA_SCOPE = Layout(
    "Gemma Scope (layer_L/width_W/average_l0_N/params.npz)",
    r"(?:.*/)?layer_(\d+)/width_(\w+)/average_l0_(\d+)/params\.npz",
    _describe,
)
GEMMA_SCOPE_2 = Layout(
    "Gemma Scope 2 (resid_post_all/layer_L_width_W_l0_SIZE/params.safetensors, or transcoder_all/…)",
    r"(?P<folder>(?:(?:.*/)?(?P<site>\w+)/)?layer_(?P<layer>\d+)_width_(?P<width>\w+?)_l0_(?P<size>\w+))"
    r"/params\.safetensors",
    _describe_2,
)
"""`resid_post_all` has every layer, `resid_post` a few layers at more widths and sparsities."""


def _describe_llama(files: SaeFiles, match: re.Match[str]) -> FoundSae:
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
    return FoundSae(files, weights, layer, convention, d_model, d_sae, hook, read=_read_llama)


def _read_llama(arrays: Arrays, convention: Convention) -> SaeWeights:
    encoder, decoder = arrays["encoder.weight"], arrays["decoder.weight"].T
    return SaeWeights(arrays.file, encoder, decoder, arrays["encoder.bias"], arrays["decoder.bias"], convention)


LLAMA_SCOPE = Layout(
    "Llama Scope (hyperparams.json + checkpoints/final.safetensors)", r"(.*/)?hyperparams\.json", _describe_llama
)
