"""Old pickled checkpoints (a state dict in a `.pt`, `.pth` or `.pkl` file) as SAELens folders of safetensors.

A pickle is a program. It is opened weights-only, in a process of its own with limits of memory and time, and only its
tensors come back, in a file that can hold nothing else.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from demur.errors import InputError, SaeError
from demur.saes._canonical import ActivationName, Convention, SaeSpec, SaeWeights
from demur.saes._files import Arrays, NamedArray, open_arrays
from demur.saes._sae import DenseSae, Sae

_LAYER: Final = re.compile(r"(?:layers?[_.]?|blocks\.|\bL|-l)(\d+)")
_GRACE: Final = 3 * 2**30
"""Bytes that reading may take beside several times the file."""


class _Names(NamedTuple):
    """The names of one library's arrays; decoder biases by any of several."""

    title: str
    encoder: str
    b_enc: str
    decoder: str
    b_dec: tuple[str, ...]
    features_first: bool
    """The encoder is stored `d_sae d_model`, and the decoder `d_model d_sae`."""
    centred: bool
    """The input is centred on the decoder's bias, unless one says otherwise."""


_LAYOUTS: Final = (
    _Names("SAELens", "W_enc", "b_enc", "W_dec", ("b_dec",), False, True),
    _Names("dictionary_learning", "encoder.weight", "encoder.bias", "decoder.weight",
           ("b_dec", "bias", "decoder_bias", "decoder.bias"), True, True),
    _Names("Goodfire", "encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight",
           ("decoder_linear.bias",), True, False),
)  # fmt: skip
_THRESHOLDS: Final = ("threshold", "log_threshold", "topk_threshold")


class Converted(NamedTuple):
    """What was made of a checkpoint: its SAE, and what was taken for granted of it."""

    sae: DenseSae
    layout: str
    centred: bool


def convert(
    file: Path | str,
    out: Path | str,
    *,
    layer: int | None = None,
    activation: ActivationName | None = None,
    k: int | None = None,
    centred: bool | None = None,
    model_name: str = "",
    seconds: int = 600,
    gigabytes: float | None = None,
) -> Converted:
    """Write `out/layer_L` in SAELens' layout from a pickled state dict. Raises InputError: there is no such file, or
    its layer is not known; SaeError: it cannot be read safely, or its arrays are not those of an SAE.

    Args:
        file: the checkpoint.
        out: folder of a suite.
        layer: whose output the SAE reads; default: from the names of file and folders.
        activation: relu, jumprelu or topk; default: jumprelu where there are thresholds, topk where there is `k`.
        k: active features of a TopK dictionary; default: the checkpoint's `k`.
        centred: whether the input is centred on the decoder's bias; default: as the library of that layout does it.
        model_name: of the model, for the configuration.
        seconds, gigabytes: limits of reading; default: 3 GiB and four times the file.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"there is no checkpoint {file}")
    found = _LAYER.findall(file.resolve().as_posix())
    if layer is None and not found:
        raise InputError(f"the name of {file} does not say of which layer it is; give --layer")
    layer = int(found[-1]) if layer is None else layer
    size = int(gigabytes * 2**30) if gigabytes else _GRACE + 4 * file.stat().st_size
    with TemporaryDirectory() as folder:
        arrays = open_arrays(_unpickled(file, Path(folder) / "tensors.safetensors", size, seconds))
        sae, layout, used = _sae(file, arrays, layer, activation, k, centred)
    sae.save_saelens(Path(out) / f"layer_{layer}", model_name=model_name)
    return Converted(sae, layout, used)


def _unpickled(file: Path, out: Path, size: int, seconds: int) -> Path:
    # By its path and isolated: it needs nothing of this package, nor of the current folder.
    script = Path(__file__).with_name("_unpickle.py")
    command = [sys.executable, "-I", *map(str, (script, file.resolve(), out, size, seconds))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * seconds, check=False)
    except subprocess.TimeoutExpired:
        raise SaeError(f"{file} was not read within {2 * seconds} seconds; give it more with --seconds") from None
    if done.returncode:
        why = (done.stdout.strip().splitlines() or [f"its reader ended with status {done.returncode}"])[-1]
        raise SaeError(
            f"{file} cannot be read as a checkpoint of tensors alone ({why}). Nothing in it was run. Save the state "
            "dict again with torch.save, or as safetensors"
        )
    return out


def _sae(
    file: Path, arrays: Arrays, layer: int, activation: ActivationName | None, k: int | None, centred: bool | None
) -> tuple[DenseSae, str, bool]:
    named = Arrays(str(file), _innermost(arrays))
    layout = next((each for each in _LAYOUTS if each.encoder in named and each.decoder in named), None)
    if layout is None:
        expected = "; or ".join(f"{each.encoder}, {each.b_enc}, {each.decoder}, {each.b_dec[0]}" for each in _LAYOUTS)
        raise SaeError(f"{file} holds {', '.join(sorted(arrays)) or 'no tensors'}; expected {expected}")
    used = layout.centred if centred is None else centred
    kind = next((name for name in _THRESHOLDS if name in named), None)
    k = k or (int(named["k"].whole()) if "k" in named else None)
    activation = activation or ("jumprelu" if kind else "topk" if k else "relu")
    convention = Convention(activation, k if activation == "topk" else None, centred=used)
    if activation == "jumprelu" and kind is None:
        needed = f"a jumprelu SAE needs one of {', '.join(_THRESHOLDS)}"
        raise SaeError(f"{file} holds {', '.join(sorted(arrays))}; {needed}")
    encoder, decoder = named[layout.encoder], named[layout.decoder]
    b_dec = next((named[name] for name in layout.b_dec if name in named), None)
    weights = SaeWeights(
        str(file),
        encoder if layout.features_first else encoder.T,
        decoder.T if layout.features_first else decoder,
        named.get(layout.b_enc),
        b_dec,
        convention,
        threshold=named[kind] if kind and activation == "jumprelu" else None,
        threshold_is_log=kind == "log_threshold",
    )
    spec = SaeSpec(
        layer=layer, d_model=weights.d_model, d_sae=weights.d_sae, activation=activation,
        k=convention.k, source=str(file), identity="",
    )  # fmt: skip
    return Sae(spec, lambda: weights).dense(), layout.title, used


def _innermost(arrays: Mapping[str, NamedArray]) -> dict[str, NamedArray]:
    """The arrays by their names without the mappings around them (`state_dict.W_enc`), where an encoder is."""
    for name in arrays:
        for layout in _LAYOUTS:
            if name == layout.encoder or name.endswith(f".{layout.encoder}"):
                prefix = name.removesuffix(layout.encoder)
                return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
    return dict(arrays)
