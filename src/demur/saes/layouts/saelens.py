"""SAELens folders (`cfg.json` + `sae_weights.safetensors`, one SAE each, at any depth), and what else SAELens can load.

The latter is `saelens:RELEASE` or `saelens:RELEASE/SAE_ID`: the optional extra downloads and converts whole SAEs in
memory, one layer at a time, always of the newest revision; what it gives is folded as a folder is.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from demur.errors import SaeError
from demur.saes._canonical import ActivationName, SaeWeights, width_number
from demur.saes._files import Arrays, first_line, memory_array
from demur.saes._sae import Sae
from demur.saes.layouts import Config, Convention, FoundSae, Layout, SaeFiles, residual_layer

if TYPE_CHECKING:
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

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


PREFIX = "saelens:"
_LAYER = re.compile(r"(?:layer[_.]?|blocks\.|^l)(\d+)")
_WIDTH = re.compile(r"width_(\w+?)(?:_l0|/|$)")


class SaeLensRelease(SaeFiles):
    """A release of the SAELens registry: its `files` are the ids of SAEs, with the prefix."""

    def __init__(self, source: str) -> None:
        try:
            with warnings.catch_warnings(action="ignore"):
                import sae_lens
        except ImportError as error:
            raise SaeError(f"{PREFIX} sources need SAELens: pip install 'demur[saelens]'") from error
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        self._saelens: Any = sae_lens
        self.release, _, wanted = source.removeprefix(PREFIX).partition("/")
        self.name = f"{PREFIX}{self.release}"
        directory = get_pretrained_saes_directory()
        if self.release not in directory:
            raise SaeError(f"SAELens has no release {self.release!r}; {_nearest(self.release, list(directory))}")
        self.lookup: PretrainedSAELookup = directory[self.release]
        ids = list(self.lookup.saes_map)
        if wanted and wanted not in ids:
            raise SaeError(f"SAELens release {self.release} has no SAE {wanted!r}; {_nearest(wanted, ids)}")
        self.files = tuple(PREFIX + each for each in ([wanted] if wanted else ids))

    def is_here(self, file: str) -> bool:  # noqa: ARG002
        return False

    def identity(self, file: str) -> str:
        return f"{self.name}/{file}:sae-lens={self._saelens.__version__}"

    def config(self, file: str) -> Config:
        from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

        with _named_errors(f"{self.name}/{file}: SAELens cannot read its configuration"):
            return Config(f"{self.name}/{file}", load_sae_config_from_huggingface(self.release, file))

    def load(self, file: str) -> tuple[Config, Arrays]:
        """The configuration and the arrays of an SAE after SAELens has converted it."""
        source = f"{self.name}/{file}"
        with _named_errors(f"{source}: SAELens cannot load it"), warnings.catch_warnings(action="ignore"):
            sae = self._saelens.SAE.from_pretrained(self.release, file, device="cpu", dtype="float32")
        state = {name: memory_array(source, name, tensor) for name, tensor in sae.state_dict().items()}
        return Config(source, sae.cfg.to_dict()), Arrays(source, state)


@dataclass(frozen=True)
class _RegistrySae(FoundSae):
    """Its configuration may be a download, so it is read only when the SAE has been chosen."""

    files: SaeLensRelease

    def open(self) -> SaeWeights:
        config, arrays = self.files.load(self.weights)
        # A factor that SAELens knows is folded in by now, as the configuration says; without one it is refused.
        return SaeWeights.of(arrays, saelens_convention(config, norm_factor=None))

    def sae(self) -> Sae:
        # SAELens has the factor and folds it in on loading; 1 stands for it here, where only the form matters.
        return FoundSae.sae(replace(self, **described(self.files.config(self.weights), norm_factor=1.0)))


def _describe_registered(files: SaeFiles, match: re.Match[str]) -> FoundSae | None:
    if not isinstance(files, SaeLensRelease):
        return None
    sae_id = match[1]
    named, width = _LAYER.search(sae_id), _WIDTH.search(sae_id)
    # Names give the layer without a download; without one the configuration must be fetched now.
    hook = f"blocks.{named[1]}.hook_resid_post" if named else files.config(sae_id).text(*HOOK_FIELDS)
    return _RegistrySae(
        files,
        sae_id,
        layer=residual_layer(hook, f"{files.name}/{sae_id}"),
        d_sae=width_number(width[1]) if width else None,
        average_l0=files.lookup.expected_l0.get(sae_id) or None,
    )


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # downloads and parsing: SAELens lets every library's own errors through
        raise SaeError(f"{what} ({first_line(error)})") from error


def _nearest(wanted: str, names: list[str]) -> str:
    return f"the nearest are {', '.join(difflib.get_close_matches(wanted, names, n=3, cutoff=0.0))}"


SAELENS_REGISTRY = Layout(
    f"SAELens registry ({PREFIX}RELEASE or {PREFIX}RELEASE/SAE_ID)", rf"{PREFIX}(.+)", _describe_registered
)
