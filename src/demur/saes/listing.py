"""Which SAEs others have trained for a model: demur's presets, and the registry of SAELens (its file alone: no network,
and SAELens is not imported)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import yaml

from demur.errors import InputError, nearest
from demur.saes._canonical import width_name
from demur.saes._suite import PRESETS, Preset
from demur.saes.layouts.saelens import PREFIX
from demur.types import Value

_TUNED: Final = re.compile(r"-(it|instruct|chat|pt|base)$")
_CHAT: Final = re.compile(r"-(it|instruct|chat)$|gpt-oss|-distill-|^qwen3(\.\d+)?-(?!.*base)")
_OF_CHAT: Final = re.compile(r"-it-|instruct")
"""In the name of a release whose entry names the base model."""
_LAYER: Final = re.compile(r"(?:layer[_.]?|blocks\.|^l|^)(\d+)")
_WIDTH: Final = re.compile(r"width[_-](2pow\d+|\d+[km]?)|-w(\d+k)\b|hook_resid_(?:pre|post)_(\d+)$")
_SITES: Final = {
    "transcoder": r"transcoder|clt", "crosscoder": r"crosscoder", "attention": r"att|hook_z|(?:^| )l\d+a[_ ]",
    "MLP": r"mlp|(?:^| )l\d+m[_ ]", "resid_mid": r"resid[-_]mid",
    "embedding": r"embedding|blocks\.0\.hook_resid_pre|(?:^| )e-res",
    "residual": r"res|layer|blocks|(?:^| )l\d+r[_ ]",
}  # fmt: skip
"""Where an SAE sits → what its names hold, the first that fits."""
_UNREADABLE: Final = {
    "gated SAEs": "gated", "temporal SAEs": "temporal",
    "SAEs that normalise each token": "constant_norm_rescale|layer_norm|whitening",
}  # fmt: skip


class Release(Value):
    """SAEs that are published together, of one site. What is said of them is read from their names."""

    name: str
    source: str
    """What `--saes` takes."""
    model: str
    chat_trained: bool
    site: str
    layers: tuple[int, ...]
    widths: tuple[str, ...]
    l0: tuple[float, ...]
    saes: int
    unreadable: str | None = None
    """Why demur cannot read them; None: it can."""


def model_family(model: str) -> str:
    """A model's name without owner, case, and what says whether it is the base or the chat model."""
    return _TUNED.sub("", _own_name(model))


def _own_name(model: str) -> str:
    return model.rpartition("/")[2].casefold().removeprefix("meta-")


def list_presets(model: str | None = None) -> list[Preset]:
    """demur's presets, chat-trained SAEs first; of one model's family when it is named."""
    found = [each for each in PRESETS.values() if model is None or model_family(each.model) == model_family(model)]
    return sorted(found, key=lambda each: not each.chat_trained)


def list_releases(model: str | None = None) -> list[Release] | None:
    """What the registry of SAELens has for a model's family, or all of it: those that demur can read first, of them the
    chat-trained ones. None: SAELens is not installed. Raises InputError: there is nothing for that model."""
    registry = _registry()
    if registry is None:
        return None
    found = [release for name, entry in registry.items() for release in _releases(name, entry)]
    if model is not None:
        kept = [release for release in found if model_family(release.model) == model_family(model)]
        if not kept and not list_presets(model):
            near = nearest(_own_name(model), {_own_name(release.model) for release in found})
            raise InputError(f"nobody's SAEs for {model!r} are known here{near}; `demur saes train` trains some")
        found = kept
    return sorted(found, key=lambda each: (each.unreadable is not None, not each.chat_trained))


def _registry() -> Mapping[str, Any] | None:
    spec = find_spec("sae_lens")
    if spec is None or not spec.submodule_search_locations:
        return None
    text = (Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _releases(name: str, entry: Mapping[str, Any]) -> list[Release]:
    """One release for each site of a registry's entry."""
    by_site: dict[str, list[Mapping[str, Any]]] = {}
    for sae in entry["saes"]:
        by_site.setdefault(_first(_SITES, f"{name} {sae['id']} {sae['path']}") or "unknown", []).append(sae)
    model, overrides = str(entry["model"]), f"{name} {entry.get('config_overrides')}"
    why = _first(_UNREADABLE, overrides)
    return [
        Release(
            name=name,
            source=PREFIX + name,
            model=model,
            chat_trained=bool(_CHAT.search(_own_name(model)) or _OF_CHAT.search(name)),
            site=site,
            layers=tuple(sorted({layer for sae in saes if (layer := _layer(str(sae["id"]))) is not None})),
            widths=tuple(dict.fromkeys(width for sae in saes if (width := _width(f"{name} {sae['id']}")))),
            l0=tuple(sorted({float(sae["l0"]) for sae in saes if sae.get("l0")})),
            saes=len(saes),
            unreadable=why if site == "residual" else "transcoders" if site == "transcoder" else f"{site} SAEs",
        )
        for site, saes in by_site.items()
    ]


def _first(patterns: Mapping[str, str], names: str) -> str | None:
    return next((key for key, pattern in patterns.items() if re.search(pattern, names, re.IGNORECASE)), None)


def _layer(sae_id: str) -> int | None:
    match = _LAYER.search(sae_id)
    return int(match[1]) - ("hook_resid_pre" in sae_id) if match else None


def _width(names: str) -> str | None:
    match = _WIDTH.search(names)
    if match is None:
        return None
    text = next(filter(None, match.groups()))
    return width_name(2 ** int(text.removeprefix("2pow"))) if text.startswith("2pow") else text
