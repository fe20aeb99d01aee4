"""How releases store their SAEs, and what a further layout is written with.

A layout is a `Layout` value. `LAYOUTS.register(name, layout)` adds one for this process, an entry point of the group
`demur.sae_layouts` one for good.
"""

from demur.saes._array_files import Arrays, NamedArray, memory_array, open_arrays
from demur.saes._canonical import Convention, SaeWeights
from demur.saes._features import width_number
from demur.saes._files import Config, SaeFiles
from demur.saes.layouts._layout import LAYOUTS, FoundSae, HookError, Layout, residual_layer

__all__ = [
    "LAYOUTS", "Arrays", "Config", "Convention", "FoundSae", "HookError", "Layout", "NamedArray", "SaeFiles",
    "SaeWeights", "memory_array", "open_arrays", "residual_layer", "width_number",
]  # fmt: skip
