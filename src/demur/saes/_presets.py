"""Models whose SAEs and settings are known: `presets.toml`."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from demur.errors import InputError
from demur.types import Value


class PaperSettings(Value):
    """The paper's settings for one model: `l*`, `K0`, `K*` and the rest as `StudyConfig` has and explains them."""

    direction_layer: int
    k0: int = 10
    k: int = 20
    steps: int = 10
    estimator: str = "paper"
    suppress: tuple[float, ...]
    induce: tuple[float, ...]
    induce_where: str = "all"


class Preset(Value):
    """A chat model, and the SAEs to read it with. A study of the model takes them from here unless told otherwise."""

    model: str
    saes: str
    """Source for `load_suite`."""
    width: str | None
    average_l0: float = 100.0
    layers: tuple[int, ...] | None = None
    """None: every layer of the suite."""
    chat_trained: bool = False
    """The SAEs were trained on the chat model itself, not on its base."""
    paper: PaperSettings | None = None
    """None: the paper did not study this model, and units differ too much between SAEs to borrow settings."""

    def study_settings(self) -> dict[str, object]:
        """The paper's settings as fields of `StudyConfig`; InputError where the paper did not study this model."""
        if self.paper is None:
            studied = ", ".join(preset.model for preset in PRESETS.values() if preset.paper)
            raise InputError(
                f"the paper has no settings for {self.model}; it studied {studied}. Leave out --paper-settings; "
                "--direction-layer, --suppress and --induce set by hand what is otherwise chosen from the data"
            )
        return dict(self.paper)


_TABLES = tomllib.loads(files("demur.saes").joinpath("presets.toml").read_text("utf-8"))
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {model: Preset.model_validate({"model": model} | table) for model, table in _TABLES.items()}
)
"""Model id → preset."""

_NAMES = {form.casefold(): name for name in PRESETS for form in (name, name.split("/")[1])}
"""Model ids without case, with and without owner → model id."""


def find_preset(saes: str) -> Preset | None:
    """The preset meant by a model's name given in place of SAEs, as for a fine-tune of that model. None where `saes` is
    a folder or names no model of a preset: then it names SAEs."""
    known = not Path(saes).expanduser().is_dir() and saes.casefold() in _NAMES
    return PRESETS[_NAMES[saes.casefold()]] if known else None


def get_preset(model: str) -> Preset:
    """The preset of a model, by hub id; case and the owner may be left out. InputError names the nearest."""
    if model.casefold() in _NAMES:
        return PRESETS[_NAMES[model.casefold()]]
    near = difflib.get_close_matches(model.casefold(), _NAMES, n=1, cutoff=0.0)[0]
    raise InputError(
        f"there is no preset for {model!r}; the nearest is {_NAMES[near]}. Presets: {', '.join(PRESETS)}. For another "
        "model, name its SAEs; for a fine-tune of one of these, name that model as its SAEs (--saes)."
    )
