"""A suite: layer → SAE, lazy; how a folder, a hub repository or a model gives one, its layout detected; and the models
whose SAEs and settings are known (`presets.toml`)."""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from demur.errors import InputError, SaeError
from demur.model import MLP_MODELS, ChatModel
from demur.saes._canonical import SaeSpec, width_name, width_number
from demur.saes._files import HubRepository, SaeFiles
from demur.saes._sae import DenseSae, Sae
from demur.saes.layouts import LAYOUTS, FoundSae
from demur.saes.layouts.saelens import PREFIX, SaeLensRelease
from demur.types import Site, Value


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
    neuronpedia: str | None = None
    """`MODEL/SOURCE` on Neuronpedia, with `{layer}` and `{width}` to fill in; None where it does not have them."""
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


def _spans(numbers: Sequence[int]) -> str:
    """`0–25`, or `0–3, 7, 9–11`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if not parts or number != parts[-1][-1] + 1:
            parts.append([])
        parts[-1].append(number)
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


class MissingLayerError(SaeError, KeyError):
    """The suite has no SAE for a layer. Also a `KeyError`, so that a suite is a proper mapping."""

    __str__ = Exception.__str__


def missing_layer(source: str, layer: int, there: Sequence[int]) -> MissingLayerError:
    near = min(there, key=lambda other: abs(other - layer))
    return MissingLayerError(f"{source} has no SAE for layer {layer}; it has layers {_spans(there)} (nearest: {near})")


class Suite(Mapping[int, Sae]):
    """SAEs by decoder layer, ascending. Making one reads configurations; weights are read when asked for."""

    def __init__(self, saes: Sequence[Sae], source: str) -> None:
        self._saes = {sae.spec.layer: sae for sae in sorted(saes, key=lambda sae: sae.spec.layer)}
        self.source = source
        if not saes:
            raise SaeError(f"{source} holds no SAEs")
        if len(self._saes) != len(saes):
            raise SaeError(f"{source} holds two SAEs for one layer")

    @classmethod
    def from_dense(cls, saes: Mapping[int, DenseSae]) -> Suite:
        for layer, sae in saes.items():
            if layer != sae.layer:
                raise SaeError(f"an SAE of layer {sae.layer} was given for layer {layer}")
        return cls([sae.sae() for sae in saes.values()], "memory")

    def __getitem__(self, layer: int) -> Sae:
        if layer not in self._saes:
            raise missing_layer(self.source, layer, self.layers)
        return self._saes[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._saes)

    def __len__(self) -> int:
        return len(self._saes)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._saes)

    @property
    def specs(self) -> tuple[SaeSpec, ...]:
        """What is known of each SAE without its weights, by layer."""
        return tuple(sae.spec for sae in self._saes.values())

    @property
    def reads(self) -> dict[int, Site]:
        """Layer → where its dictionary reads, for those that do not read the residual that leaves it."""
        return {spec.layer: spec.reads for spec in self.specs if spec.reads != "resid_post"}

    @property
    def noun(self) -> str:
        """What its dictionaries are, for people."""
        return "transcoders" if self.reads else "SAEs"

    @property
    def identity(self) -> str:
        """SHA-256, hex, of every layer's content key: the suite's key in the hashes of runs."""
        return hashlib.sha256("".join(f"{spec.layer} {spec.identity}\n" for spec in self.specs).encode()).hexdigest()

    def describe(self) -> str:
        """One line for people: layers, widths, activation, sparsity, source."""
        widths = " and ".join(map(width_name, sorted({spec.d_sae for spec in self.specs})))
        kinds = " and ".join(sorted({spec.activation for spec in self.specs}))
        l0s = [spec.average_l0 for spec in self.specs if spec.average_l0 is not None]
        sparsity = f", average L0 {min(l0s):g} to {max(l0s):g}" if l0s else ""
        size = f"{widths} features, d_model {self.specs[0].d_model}"
        return f"{len(self)} {self.noun} on layers {_spans(self.layers)}, {size}, {kinds}{sparsity}, from {self.source}"

    def check(self, *, d_model: int, n_layers: int, model_type: str | None = None) -> None:
        """SaeError where an SAE's configuration does not fit a model; no weight is read or downloaded."""
        if self.reads and model_type is not None and model_type not in MLP_MODELS:
            raise SaeError(
                f"{self.source} holds transcoders, which read the MLP's input; that is known in models of the types "
                f"{', '.join(MLP_MODELS)}, not in {model_type}. Choose SAEs of the residual stream"
            )
        for spec in self.specs:
            if spec.d_model != d_model:
                wrong = f"reads residuals of width {spec.d_model}, but the model's are {d_model}"
            elif spec.layer >= n_layers:
                wrong = f"sits on layer {spec.layer}, but the model has 0 to {n_layers - 1}"
            else:
                continue
            raise SaeError(f"{spec.source} {wrong}; choose SAEs that were trained on this model or its base")

    def check_files(self) -> None:
        """`Sae.check_file` of every layer, so that damage shows before anything is computed."""
        for sae in self._saes.values():
            sae.check_file()


def load_saes(
    model: ChatModel | str | Path,
    source: str | Path | None = None,
    *,
    layers: Sequence[int] | None = None,
    width: str | int | None = None,
    average_l0: float | None = None,
    revision: str | None = None,
) -> Suite:
    """The SAEs of a model, checked to fit it; of one that is given by its hub id, not checked. Raises as `load_suite`
    does; InputError too where there is neither `source` nor preset, SaeError where the SAEs do not fit the model.

    Args:
        source: as in `load_suite`, or a model that has a preset, for a fine-tune of it; default: the preset of `model`.
        layers, width, average_l0, revision: as in `load_suite`; default: the preset's.
    """
    name = model.name if isinstance(model, ChatModel) else str(model)
    preset = get_preset(name) if source is None else find_preset(str(source))
    if preset is not None:
        source, layers, width = preset.saes, layers or preset.layers, width or preset.width
        average_l0 = average_l0 or preset.average_l0
    suite = load_suite(str(source), layers=layers, width=width, average_l0=average_l0 or 100.0, revision=revision)
    if isinstance(model, ChatModel):
        kind = model.hf.config.get_text_config(decoder=True).model_type
        suite.check(d_model=model.d_model, n_layers=model.n_layers, model_type=kind)
    return suite


def load_suite(
    source: str | Path,
    *,
    layers: Sequence[int] | None = None,
    average_l0: float = 100.0,
    width: str | int | None = None,
    revision: str | None = None,
) -> Suite:
    """Open SAEs. None is downloaded before its weights are asked for; files that are here are checked (`check_files`).
    Raises InputError: a layer is given twice; SaeError: nothing readable there, a missing layer or width, other
    activations, or a damaged file.

    Args:
        source: a folder, a hub repository (`owner/name`, or a folder in it), or `saelens:RELEASE[/SAE_ID]` (extra
            `demur[saelens]`).
        layers: only these; default: every layer that has an SAE (of the wanted width).
        average_l0: of several SAEs of one layer, the nearest is taken (the paper's rule); of two, the sparser.
        width: number of features, as a number or a name like `65k`; needed where there are several.
        revision: branch, tag or commit of a hub repository; default: its newest commit.
    """
    files = _open_source(str(source), revision)
    candidates = next((found for name in LAYOUTS if (found := LAYOUTS[name].find(files))), None)
    if candidates is None:
        known = "; ".join(LAYOUTS[name].title for name in LAYOUTS)
        raise SaeError(f"{files.name} holds no SAEs in a known layout; known are: {known}")
    number = None if width is None else width_number(str(width))
    if width is not None and number is None:
        raise SaeError(f"width {width!r} is not a number of features; expected for example 65536 or 65k")
    chosen = _choose(candidates, files.name, layers, number, average_l0)
    suite = Suite([one.sae() for one in chosen], files.name)
    suite.check_files()
    return suite


def _open_source(source: str, revision: str | None) -> SaeFiles:
    if source.startswith(PREFIX):
        if revision is not None:
            raise SaeError(f"{source}: SAELens loads the newest revision only; leave out revision {revision!r}")
        return SaeLensRelease(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise SaeError(f"a revision ({revision!r}) only makes sense for a hub repository; {source} is a folder")
        return SaeFiles(folder)
    if folder.exists() or "/" not in source or source.startswith((".", "/", "~")) or "" in source.split("/"):
        raise SaeError(
            f"{source} is not a folder of SAEs; expected a folder, or a hub repository as OWNER/NAME or "
            "OWNER/NAME/FOLDER"
        )
    return HubRepository(source, revision)


def _choose(
    found: Sequence[FoundSae], source: str, layers: Sequence[int] | None, width: int | None, average_l0: float
) -> list[FoundSae]:
    """One SAE per layer: of the right width, with the average L0 nearest to `average_l0` (ties: the smaller)."""
    available = sorted({one.layer for one in found})
    for layer in layers or ():
        if list(layers or ()).count(layer) > 1:
            raise InputError(f"layer {layer} is given twice; give each layer once")
        if layer not in available:
            raise missing_layer(source, layer, available)
    chosen: list[FoundSae] = []
    for layer in available if layers is None else sorted(layers):
        here = [one for one in found if one.layer == layer]
        fitting = [one for one in here if width is None or one.d_sae in (None, width)]
        if not fitting and layers is not None:
            raise SaeError(f"{source}: no width {width_name(width or 0)} at layer {layer}; {_widths(here)}")
        if len({one.d_sae for one in fitting}) > 1:
            raise SaeError(f"{source} has several widths at layer {layer}: choose one with `width`; {_widths(fitting)}")
        if fitting:
            chosen.append(_nearest(fitting, average_l0, source))
    if not chosen:
        raise SaeError(f"{source} has no SAEs of width {width_name(width or 0)}; {_widths(found)}")
    return chosen


def _nearest(found: Sequence[FoundSae], average_l0: float, source: str) -> FoundSae:
    if len(found) == 1:
        return found[0]
    known = [(abs(l0 - average_l0), l0, one.weights, one) for one in found if (l0 := one.l0) is not None]
    if not known:
        places = ", ".join(one.weights for one in found[:4])
        raise SaeError(
            f"{source} holds {len(found)} SAEs for layer {found[0].layer} and no average L0 to choose by "
            f"({places}); give the folder of one of them"
        )
    return min(known, key=lambda entry: entry[:3])[3]


def _widths(found: Iterable[FoundSae]) -> str:
    return "widths there: " + ", ".join(width_name(w) for w in sorted({one.d_sae for one in found if one.d_sae}))
