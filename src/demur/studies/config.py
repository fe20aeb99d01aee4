"""The typed configuration of the features study: what `study.toml` and the command line's options fill in. No torch."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from demur.errors import InputError
from demur.types import Value


class PromptSource(Value):
    """Where prompts come from: a file or a named set, and the column to read (found when not named)."""

    source: str
    column: str | None = None


class StudyConfig(Value):
    """Everything that the numbers of a features study depend on, besides the files themselves.

    `model=None` is the bundled model with its own SAEs and prompts; then nothing else is required.
    """

    model: str | None = None
    """Hugging Face id or local folder."""
    revision: str | None = None
    """Revision of the model on the hub."""
    saes: str | None = None
    """Preset, hub id or local folder of the SAEs (default: the preset of the model)."""
    saes_revision: str | None = None
    sae_width: str | None = None
    """Width folder to use, for example "65k" (Gemma Scope layouts)."""
    average_l0: float = Field(default=100.0, gt=0)
    """Per layer, the SAE whose average L0 is nearest (Gemma Scope layouts)."""
    layers: tuple[int, ...] | None = None
    """Layers whose features may be chosen (default: every layer that has an SAE)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", "mps", or a `device_map` such as "balanced"."""
    system_prompt: str | None = None

    paper_settings: bool = False
    """Use the paper's settings for this model (direction layer, K0, K*, steps, c, v, estimator), from its preset.
    They win over the fields below."""

    harmful: tuple[PromptSource, ...] = ()
    harmless: tuple[PromptSource, ...] = ()
    test_harmful: tuple[PromptSource, ...] = ()
    """Held-out harmful prompts (default: part of `harmful`)."""
    test_harmless: tuple[PromptSource, ...] = ()
    n_direction: int = Field(default=128, ge=2)
    n_selection: int = Field(default=32, ge=2)
    n_tuning: int = Field(default=32, ge=2)
    n_test: int = Field(default=100, ge=2)
    seed: int = 0

    direction_layer: int | None = None
    """Fixes the direction's layer (default: chosen; see `demur.method.direction`)."""
    direction_position: int | None = Field(default=None, le=-1)
    """Fixes the direction's position, counted from the prompt's end (-1 is the last token)."""
    direction_form: Literal["linear", "affine", "auto"] = "auto"
    kl_threshold: float = Field(default=0.1, gt=0)
    """Candidates whose ablation moves harmless prompts further than this (nats) are dropped."""

    k0: int = Field(default=10, ge=1)
    """Features per layer in the pool."""
    pool: Literal["cosine", "attribution", "union"] = "cosine"
    """What fills the pool: the k0 features of each layer nearest to the direction (the paper's), as many features over
    all layers by attribution of whole dictionaries, or both."""
    k: int = Field(default=20, ge=1)
    """Features in F*."""
    steps: int = Field(default=10, ge=1)
    """Integrated-gradients steps."""
    estimator: Literal["gradient", "ig", "paper"] = "gradient"
    """How features are scored; `docs/attribution.md` says why plain gradients are the default."""
    n_exact: int = Field(default=8, ge=0)
    """Test prompts on which the pool is also patched exactly (0 leaves the comparison out)."""

    suppress: tuple[float, ...] = Field(default=(0.0, -1.0, -3.0), min_length=1)
    """Scale factors c that are tried; the tuning split chooses one."""
    induce: tuple[float, ...] | None = Field(default=None, min_length=1)
    """Activations v that are tried on all features alike. Default: multiples of each feature's own peak instead."""
    induce_multiples: tuple[float, ...] = Field(default=(0.5, 0.75, 1.0, 1.5), min_length=1)
    """Multiples of each feature's mean peak activation on harmful prompts, used when `induce` is not given."""
    induce_where: Literal["all", "prompt"] = "prompt"
    """Tokens on which features are set. The paper sets them on the answer's tokens as well ("all"), which small models
    answer by repeating the first word of a refusal."""
    max_new_tokens: int = Field(default=32, ge=1)
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Upper bound on tokens in one forward pass (default: from free memory; halved when memory runs out)."""
    judge: str | None = None
    """Outcome judge (default: "patterns", or the bundled model's own)."""

    def with_settings(self, settings: Mapping[str, object]) -> Self:
        """This configuration with a preset's settings laid over it."""
        return type(self).model_validate(self.model_dump() | dict(settings))

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if self.model is not None and not (self.harmful and self.harmless):
            missing = "harmful" if not self.harmful else "harmless"
            raise ValueError(f"no {missing} prompts given; name a file or a set with --{missing}")
        if self.model is None:
            given = [name for name in _ONLY_WITH_A_MODEL if getattr(self, name)]
            if given:
                names = ", ".join("--" + name.replace("_", "-") for name in given)
                raise ValueError(
                    f"{names} given without a model: the bundled model has its own SAEs and "
                    "prompts. Name a MODEL, or leave them out"
                )
        return self


ConfigT = TypeVar("ConfigT", bound=StudyConfig)

_ONLY_WITH_A_MODEL = (
    "revision",
    "saes",
    "saes_revision",
    "sae_width",
    "paper_settings",
    "harmful",
    "harmless",
    "test_harmful",
    "test_harmless",
)


def load_config(path: Path | None, overrides: dict[str, object], kind: type[ConfigT] = StudyConfig) -> ConfigT:
    """Read a TOML file (if any), lay the options given on the command line over it, and validate.

    Raises:
        InputError: the file cannot be read or holds a value that does not fit; names each field and what was expected.
    """
    values: dict[str, object] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the configuration {path}: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{path} is not valid TOML: {error}") from error
    values |= {name: value for name, value in overrides.items() if value is not None}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        complaints = "\n  ".join(_complaint(each) for each in error.errors())
        raise InputError(f"the study's configuration does not fit ({path or 'options'}): {complaints}") from None


def _complaint(error: ErrorDetails) -> str:
    """One of pydantic's complaints in plain words."""
    field = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


__all__ = ["ConfigT", "PromptSource", "StudyConfig", "load_config"]
