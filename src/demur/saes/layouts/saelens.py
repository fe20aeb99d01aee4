"""SAELens folders: `cfg.json` + `sae_weights.safetensors`, one SAE each, at any depth."""

from __future__ import annotations

import re
from typing import Any

from demur.errors import SaeError
from demur.saes._features import ActivationName
from demur.saes.layouts import Config, Convention, FoundSae, Layout, SaeFiles, residual_layer

HOOK_FIELDS = ("metadata.hook_name", "hook_name", "hook_point", "metadata.hf_hook_name")
_SCALER = "activation_scaler.json"
_ACTIVATIONS: dict[str, ActivationName] = {
    "standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "batchtopk": "jumprelu",
}  # fmt: skip


def _describe(files: SaeFiles, match: re.Match[str]) -> FoundSae | None:
    folder = match[1] or ""
    weights = f"{folder}sae_weights.safetensors"
    if weights not in files.files:
        return None
    config = files.config(match[0])
    return FoundSae(files, weights, **described(config, _norm_factor(files, folder, config)))


def _norm_factor(files: SaeFiles, folder: str, config: Config) -> float | None:
    """The factor of `expected_average_only_in`, from the configuration or a training checkpoint's file."""
    if config.get("norm_scaling_factor") is not None:
        return config.number("norm_scaling_factor")
    if folder + _SCALER not in files.files:
        return None
    scaler = files.config(folder + _SCALER)
    return scaler.number("scaling_factor") if scaler.get("scaling_factor") is not None else None


def described(config: Config, norm_factor: float | None) -> dict[str, Any]:
    """What a SAELens configuration says of an SAE, as fields of `FoundSae`; raises as `saelens_convention` does."""
    hook = config.text(*HOOK_FIELDS)
    layer, convention = residual_layer(hook, config.file), saelens_convention(config, norm_factor)
    d_model, d_sae = config.integer("d_in"), config.integer("d_sae")
    return {"layer": layer, "convention": convention, "hook": hook, "d_model": d_model, "d_sae": d_sae}


def saelens_convention(config: Config, norm_factor: float | None) -> Convention:
    """How the weights are to be used, by `cfg.json` and the input scale of `expected_average_only_in`, where known."""
    architecture = config.get("architecture") or "standard"
    function = config.get("activation_fn", "activation_fn_str") or "relu"
    if function == "topk":
        architecture = "topk"
    elif function not in ("relu", "jumprelu"):
        raise SaeError(f"{config.file}: activation_fn {function!r} has no canonical form; demur reads relu and topk")
    if architecture not in _ACTIVATIONS:
        raise SaeError(
            f"{config.file}: architecture {architecture!r} has no canonical form; demur reads {', '.join(_ACTIVATIONS)}"
        )
    k = config.get("activation_fn_kwargs.k", "k") if architecture == "topk" else None
    if architecture == "topk" and (not isinstance(k, int) or k < 1):
        raise SaeError(f"{config.file}: a topk SAE needs a whole number k, not {k!r}")
    if config.get("reshape_activations") == "hook_z":
        raise SaeError(f"{config.file}: reshape_activations is hook_z; demur needs SAEs of the residual stream")
    # SAELens centres the input unless the configuration says otherwise, in all its versions.
    centred = config.get("apply_b_dec_to_input") is not False
    # Only the top-k kinds know this field. A batchtopk folder is a training checkpoint: on by default.
    rescaled = config.get("rescale_acts_by_decoder_norm") if "topk" in architecture else False
    unit_decoder = architecture == "batchtopk" if rescaled is None else bool(rescaled)
    return Convention(_ACTIVATIONS[architecture], k, centred, _scale(config, norm_factor), unit_decoder)


def _scale(config: Config, norm_factor: float | None) -> float:
    kind = config.get("normalize_activations")
    if kind in (None, "none", False):
        return 1.0
    if kind not in ("expected_average_only_in", True):
        raise SaeError(
            f"{config.file}: normalize_activations is {kind!r}, which rescales each token by its own norm or variance; "
            "that cannot be folded into weights. Choose another SAE."
        )
    if norm_factor is None:
        raise SaeError(
            f"{config.file}: normalize_activations is {kind!r}, but its factor is neither there (norm_scaling_factor) "
            f"nor in {_SCALER} beside it. Add it, or fold it in with SAELens."
        )
    return norm_factor


SAELENS = Layout("SAELens (cfg.json + sae_weights.safetensors)", r"(.*/)?cfg\.json", _describe)
