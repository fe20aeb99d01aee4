"""Sparse autoencoders: a lazy suite `layer → SAE` in one canonical form, read a few features at a time. What a further
layout of files is written with is in `demur.saes.layouts`."""

from demur.saes._canonical import (
    ActivationName,
    Encoder,
    FeatureRows,
    Features,
    Rows,
    SaeSpec,
    TopKEncoder,
    TopKRows,
    width_name,
    width_number,
)
from demur.saes._sae import DenseSae, Sae
from demur.saes._suite import (
    PRESETS,
    MissingLayerError,
    Preset,
    Suite,
    find_preset,
    get_preset,
    load_saes,
    load_suite,
    spans,
)
from demur.saes.layouts import LAYOUTS, HookError

__all__ = [
    "LAYOUTS", "PRESETS", "ActivationName", "DenseSae", "Encoder", "FeatureRows", "Features", "HookError",
    "MissingLayerError", "Preset", "Rows", "Sae", "SaeSpec", "Suite", "TopKEncoder", "TopKRows", "find_preset",
    "get_preset", "load_saes", "load_suite", "spans", "width_name", "width_number",
]  # fmt: skip
