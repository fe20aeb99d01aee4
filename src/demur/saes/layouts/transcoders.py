"""Sets of transcoders as circuit-tracer loads them: `config.yaml` beside one `layer_L.safetensors` for each layer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from demur.errors import SaeError
from demur.saes._canonical import Convention, SaeWeights
from demur.saes._files import Arrays
from demur.saes._sae import Sae
from demur.saes.layouts import Config, FoundSae, HookError, Layout, SaeFiles, mlp_sites

_THRESHOLD = "activation_function.threshold"
_KNOWN_K = {"facebook/crv-8b-instruct-transcoders": 128}
"""Features per token of releases whose configuration says TopK and no number (circuit-tracer knows it too)."""


@dataclass(frozen=True)
class _Transcoder(FoundSae):
    """One layer of a set. Whether it is a ReLU or JumpReLU dictionary is seen in its file, as is its shape, so it is
    opened when it is chosen."""

    def sae(self) -> Sae:
        found = self
        if self.convention.activation == "relu" and _THRESHOLD in self.files.arrays(self.weights):
            found = replace(self, convention=Convention("jumprelu"))
        return FoundSae.sae(found)


def _read(arrays: Arrays, convention: Convention) -> SaeWeights:
    """Its encoder is stored features first, its skip connection as a linear layer's weight."""
    w_enc, w_dec, b_enc, b_dec = (arrays[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    threshold = arrays.get(_THRESHOLD) if convention.activation == "jumprelu" else None
    skip = arrays["W_skip"].T if "W_skip" in arrays else None
    return SaeWeights(arrays.file, w_enc, w_dec, b_enc, b_dec, convention, threshold, skip=skip)


def _activation(config: Config, files: SaeFiles) -> Convention:
    kind = config.get("activation") or "relu"
    if kind not in ("relu", "jumprelu", "jump_relu", "topk"):
        raise SaeError(f"{config.file}: activation {kind!r} has no canonical form; demur reads relu, jumprelu and topk")
    if kind != "topk":
        return Convention("relu" if kind == "relu" else "jumprelu")
    k = config.get("k") or next((k for name, k in _KNOWN_K.items() if files.name.startswith(name)), None)
    if not isinstance(k, int):
        raise SaeError(f"{config.file}: activation is topk, but `k`, the features kept per token, is missing; add it")
    return Convention("topk", k)


def _describe(files: SaeFiles, match: re.Match[str]) -> FoundSae | None:
    folder = PurePosixPath(match[0]).parent
    beside = str(folder / "config.yaml")
    config = files.config(beside) if beside in files.files else None
    if config is None or config.get("model_kind") is None:
        return None  # Some other folder of YAML or safetensors files.
    if (kind := config.get("model_kind")) != "transcoder_set":
        raise HookError(
            f"{config.file} is a {kind}; demur takes transcoders of single layers (model_kind transcoder_set), whose "
            "features write to the layer that they read"
        )
    if listed := config.get("transcoders"):
        place = PurePosixPath(str(listed[0]).removeprefix("hf://"))
        raise HookError(
            f"{config.file} lists files of another release; name that one: {'/'.join(place.parts[:3])} (of the same "
            "files, --sae-width and --average-l0 choose)"
        )
    if match["layer"] is None:
        return None
    hooks = config.text("feature_input_hook"), config.text("feature_output_hook")
    if hooks[1] == "mlp.hook_out" and "gemma" in str(config.get("model_name")).lower():
        raise HookError(f"{config.file} writes before the norm behind Gemma's MLP; demur needs hook_mlp_out")
    reads, writes = mlp_sites(*hooks, config.file)
    convention, where = _activation(config, files), f"{hooks[0]} to {hooks[1]}"
    return _Transcoder(
        files, match[0], int(match["layer"]), convention, hook=where, read=_read, reads=reads, writes=writes
    )


CIRCUIT_TRACER = Layout(
    "circuit-tracer transcoders (config.yaml + layer_L.safetensors)",
    r"(?:.*/)?(?:config\.yaml|layer_(?P<layer>\d+)\.safetensors)",
    _describe,
)
