"""The options that studies share, as typed configurations: each field is an option, the docstring under it its help.

The command line, `NAME.toml`, the reference page and `demur plan` are derived from these classes. No torch here.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from demur.errors import InputError
from demur.types import PURPOSES, SplitSizes, Value

MAX_SEED = 2**63 - 1


def _numbers(value: object) -> object:
    """Numbers given as text, such as `"0,-1,-3"`, alone or in a list; a single number as a list of one."""
    if isinstance(value, str):
        return [part for part in value.replace(" ", "").split(",") if part]
    if isinstance(value, list | tuple):
        return [number for item in cast("list[object]", value) for number in cast("list[object]", _numbers(item))]
    return [value]


def _layers(value: object) -> object:
    """`"0-5,8,10"` as layer numbers."""
    if not isinstance(value, str):
        return value
    found: list[int] = []
    for part in value.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"{part!r} is not a layer or a range of layers; expected for example 0-5,8,10")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _once(layers: tuple[int, ...]) -> tuple[int, ...]:
    for layer, times in sorted(Counter(layers).items()):
        if times > 1:
            raise ValueError(f"layer {layer} is named twice; name each layer once")
    return layers


def _split_sizes(value: object) -> object:
    """`"128,32,32,100"` in the order of the splits, or `"test=50,tuning=16"`."""
    if isinstance(value, list | tuple):
        value = ",".join(str(part) for part in cast("list[object]", value))
    if not isinstance(value, str):
        return value
    parts = value.replace(" ", "").split(",")
    if not any("=" in part for part in parts):
        if len(parts) != len(PURPOSES):
            raise ValueError(f"{value!r} has {len(parts)} numbers; expected {len(PURPOSES)}: {','.join(PURPOSES)}")
        parts = [f"{name}={part}" for name, part in zip(PURPOSES, parts, strict=True)]
    found: dict[str, int] = {}
    for part in parts:
        name, _, number = part.partition("=")
        if name not in PURPOSES or not number.isdigit():
            raise ValueError(f"{part} is not a size; expected {','.join(PURPOSES)} or test=50,tuning=16")
        if name in found:
            raise ValueError(f"the size of the {name} split is given twice")
        found[name] = int(number)
    return found


def _each(fits: Callable[[float], bool], expected: str) -> AfterValidator:
    """Values that all fit, each kept once."""

    def read(values: tuple[float, ...]) -> tuple[float, ...]:
        if not all(map(fits, values)):
            raise ValueError(expected)
        return tuple(dict.fromkeys(values))

    return AfterValidator(read)


Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
Factors = Annotated[Numbers, _each(lambda c: c != 1, "c = 1 changes nothing; leave it out")]
Positive = Annotated[Numbers, _each(lambda value: value > 0, "every value must be above 0")]
Integers = Annotated[tuple[int, ...], BeforeValidator(_numbers)]
SetSizes = Annotated[
    Integers,
    _each(lambda size: size >= 1, "sizes and dimensions begin at 1"),
    AfterValidator(lambda sizes: tuple(sorted(sizes))),
]
Layers = Annotated[tuple[int, ...], BeforeValidator(_layers), AfterValidator(_once)]
Sources = Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""Files or named sets, each `SOURCE` or `SOURCE::COLUMN`."""
Sizes = Annotated[SplitSizes, BeforeValidator(_split_sizes)]


class Options(Value):
    """Base of the option classes. `group` is the heading of their fields in help pages."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    group: ClassVar[str] = "Options"


class ModelOptions(Options):
    """What is studied."""

    group: ClassVar[str] = "Model and SAEs"

    model: str | None = None
    """Hugging Face id or local folder of a chat model. Without it: the bundled model with its SAEs and prompts."""
    revision: str | None = None
    """Revision of the model on the hub."""
    saes: str | None = None
    """Folder or hub id of the SAEs, or the model whose preset to take (default: the preset of the model)."""
    saes_revision: str | None = None
    """Revision of the SAEs on the hub."""
    sae_width: str | None = None
    """Width of the SAEs, for example 65k, where there are several."""
    average_l0: float = Field(default=100.0, gt=0)
    """Per layer, take the SAE whose average L0 is nearest to this, where there are several."""
    layers: Layers | None = None
    """Layers whose features may be chosen, for example 0-5,8,10 (default: every layer that has an SAE)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model; auto is the checkpoint's own, or float32 on a CPU that does not multiply that."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, mps, or balanced (over several GPUs)."""
    system_prompt: str | None = None
    """System message of every conversation."""


class PromptOptions(Options):
    """Prompts, and how they are split."""

    group: ClassVar[str] = "Prompts"

    harmful: Sources = ()
    """File or named set of harmful prompts, SOURCE or SOURCE::COLUMN; repeatable."""
    harmless: Sources = ()
    """File or named set of harmless prompts; repeatable."""
    test_harmful: Sources = ()
    """Held-out harmful prompts (default: a part of the harmful ones)."""
    test_harmless: Sources = ()
    """Held-out harmless prompts (default: a part of the harmless ones)."""
    n: Sizes = SplitSizes()
    """Prompts per split and class, as 128,32,32,100 (direction, selection, tuning, test) or test=50,tuning=16."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of every random choice: splits, control features, bootstraps."""


class AnswerOptions(Options):
    """How answers are written and judged."""

    group: ClassVar[str] = "Answers"

    max_new_tokens: int = Field(default=32, ge=1)
    """Length of an answer, in tokens."""
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens in one forward pass at most (default: from free memory; halved when memory runs out)."""
    judge: str | None = None
    """Outcome judge: patterns, refusal=MODEL, or another name of `demur judge --help` (default: patterns; the bundled
    model has its own)."""


class FindOptions(Options):
    """How features are found (paper, section 3)."""

    group: ClassVar[str] = "Finding features"

    paper_settings: bool = False
    """Take the paper's settings for this model from its preset; they win over the options below."""
    direction_layer: int | None = Field(default=None, ge=0)
    """Layer of the refusal direction (default: chosen among all candidates)."""
    direction_position: int | None = Field(default=None, le=-1)
    """Position of the direction, counted from the prompt's end: -1 is the last token (default: chosen)."""
    direction_form: Literal["linear", "affine", "auto"] = "auto"
    """Ablate the direction to zero (linear) or to the mean of harmless prompts (affine)."""
    kl_threshold: float = Field(default=0.1, gt=0)
    """Drop candidate directions whose ablation moves the first token on harmless prompts by more than this, in nats."""
    k0: int = Field(default=10, ge=1)
    """Features per layer in the pool."""
    pool: Literal["cosine", "attribution", "union"] = "cosine"
    """What fills the pool: each layer's features nearest to the direction (the paper's), as many features over all
    layers by attribution of whole dictionaries, or both."""
    k: int = Field(default=20, ge=1)
    """Features in F*."""
    estimator: Literal["gradient", "ig", "paper"] = "gradient"
    """How features are scored: a plain gradient, path-complete integrated gradients, or the paper's."""
    steps: int = Field(default=10, ge=1)
    """Integrated-gradients steps."""
    n_exact: int = Field(default=8, ge=0)
    """Test prompts on which every feature of the pool is also patched exactly; 0 leaves that check out."""


MAIN = "cossim+ap"
"""F*, the paper's method: what the others are compared with."""
COMPLIANCE = "compliance"
"""The measure that needs no judge of harm."""
DEFAULT_METHODS = (MAIN, "random", "random-pool", "direction", "direction-affine")


class CompareOptions(Options):
    """What is compared, and how."""

    group: ClassVar[str] = "Comparison"

    methods: tuple[str, ...] = DEFAULT_METHODS
    """Methods to compare with F*; repeatable. `random` and `random-pool` are its controls."""
    suppress: Factors = Field(default=(0.0, -1.0, -3.0), min_length=1)
    """Scale factors c to try, as 0,-1,-3; the tuning prompts choose one for each method."""
    induce: Positive | None = Field(default=None, min_length=1)
    """Activations v to try, the same for all features (default: multiples of each feature's own maximum instead)."""
    induce_multiples: Positive = Field(default=(0.5, 0.75, 1.0, 1.5), min_length=1)
    """Multiples to try of each feature's mean maximum activation on harmful prompts."""
    induce_where: Literal["all", "prompt"] = "prompt"
    """Tokens on which features are set. The paper sets them on the answer's tokens too (all), which small models answer
    by repeating the first word of a refusal."""
    random_sets: int = Field(default=5, ge=2)
    """Sets drawn for each random control."""
    controls: Literal["chosen", "all"] = "chosen"
    """Answer under random controls at the strength chosen for F* only, or at all of them."""
    actdiff_tokens: Literal["max", "mean", "last"] = "max"
    """How ActDiff reduces a feature's activations over a prompt's tokens."""
    harm_judges: tuple[str, ...] = ()
    """Judges of harm, besides the outcome judge, each with an attack success of its own; repeatable."""
    ce_levels: Positive = (0.01, 0.05, 0.2)
    """ΔCE on own answers (nats per token) at which the methods' curves are compared."""
    sizes: SetSizes = ()
    """Sizes of F* whose effect is measured, as 1,2,5,10 (as far as the pool goes)."""
    dimensions: SetSizes = Field(default=(1, 2, 3, 5, 10), min_length=1)
    """Dimensions of the refusal subspaces to try; the tuning prompts choose one for each method."""

    @field_validator("methods")
    @classmethod
    def _main_first(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        # F* is what the others are compared with, named or not; local sets take their strength from the global one.
        needed = (MAIN, "ap") if "ap-local" in methods else (MAIN,)
        return tuple(dict.fromkeys((MAIN, *methods, *needed)))


class OverRefusalOptions(Options):
    """Harmless prompts that look harmful."""

    group: ClassVar[str] = "Side effects"

    over_refusal: Sources = ()
    """Harmless prompts that look harmful, such as xstest or or-bench-hard; repeatable (the bundled model has its
    own)."""
    n_over_refusal: int = Field(default=100, ge=1)
    """Over-refusal prompts to use."""


class CostOptions(OverRefusalOptions):
    """What is measured besides refusal."""

    group: ClassVar[str] = "Side effects"

    text: Sources = ()
    """Plain text on which ΔCE is measured: a file or a named sample; repeatable (the bundled model has its own)."""
    n_text: int = Field(default=100, ge=1)
    """Texts to use."""
    text_tokens: int = Field(default=128, ge=2)
    """Tokens of each text to use."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, or YAML files of tasks, to run under each method; repeatable (extra `eval`)."""
    task_limit: int | None = Field(default=None, ge=1)
    """Questions of each task (default: all)."""
    resamples: int = Field(default=2000, ge=100)
    """Resamples of every bootstrap."""


class SideEffectOptions(CostOptions):
    """What is measured besides refusal, and what the model still knows."""

    group: ClassVar[str] = "Side effects"

    knowledge: bool = True
    """Ask the model whether each test request is harmful."""


class TuneOptions(Options):
    """The search for settings on the tuning prompts."""

    group: ClassVar[str] = "Search for settings"

    tune: int = Field(default=0, ge=0)
    """Trials for each method: direction, K0, K* and c are searched on the tuning prompts (extra `eval`); 0: none."""
    tune_unit: float = Field(default=0.2, gt=0)
    """ΔCE (nats per token) that weighs as much as complying with every prompt, in the choice among trials."""


class StudyConfig(ModelOptions, PromptOptions, AnswerOptions):
    """The options of every study."""

    def with_settings(self, settings: Mapping[str, object]) -> Self:
        """This configuration with a preset's settings laid over it, as far as it has them."""
        own = {name: value for name, value in settings.items() if name in type(self).model_fields}
        return type(self).model_validate(self.model_dump() | own)

    @model_validator(mode="after")
    def _prompts_go_with_the_model(self) -> Self:
        if self.model is not None and not (self.harmful and self.harmless):
            missing = "harmful" if not self.harmful else "harmless"
            raise ValueError(f"no {missing} prompts given; name a file or a set with --{missing}")
        given = [name for name in _ONLY_WITH_A_MODEL.split() if getattr(self, name, None)]
        if self.model is None and given:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(
                f"{names} given without a model: the bundled model has its own SAEs and prompts. Name a MODEL, or "
                "leave them out"
            )
        return self


_ONLY_WITH_A_MODEL = "revision saes saes_revision sae_width paper_settings harmful harmless test_harmful test_harmless"


class FindConfig(StudyConfig, FindOptions):
    """The options of a study that finds features."""


class CompareConfig(FindConfig, CompareOptions):
    """The options of a study that compares methods."""


ConfigT = TypeVar("ConfigT", bound=StudyConfig)
KindT = TypeVar("KindT", bound=BaseModel)


def load_config(
    path: Path | None,
    overrides: Mapping[str, object],
    kind: type[KindT],
    *,
    spelled: Callable[[str], str] | None = None,
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> KindT:
    """Read a TOML file (if any), lay the options given over it, and validate. Raises InputError: the file cannot be
    read or holds a value that does not fit; names each field and what was expected.

    Args:
        path: a TOML file whose keys are field names.
        overrides: field → value given as an option; None is not given.
        kind: the configuration class.
        spelled: how an option that was given reads in messages (default: the field's name).
        complete: fills in settings that may be left out.
    """
    try:
        values = {} if path is None else tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the configuration {path}: {error}") from error
    given = {name: value for name, value in overrides.items() if value is not None}

    def problem(error: ErrorDetails) -> str:
        """One of pydantic's messages in plain words, with the option or the file's setting that it is about."""
        message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if not error["loc"]:
            return message
        name, field = str(error["loc"][0]), ".".join(map(str, error["loc"]))
        place = "" if name in given else f"{path or 'configuration'}: "
        if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
            near = get_close_matches(name, kind.model_fields, n=1)
            return f"{place}there is no setting {name!r}" + (f"; did you mean {near[0]}?" if near else "")
        return f"{place}{spelled(name) if spelled and name in given else field}: {message}"

    try:
        return kind.model_validate(complete(values | given))
    except ValidationError as error:
        raise InputError("\n  ".join(dict.fromkeys(map(problem, error.errors())))) from None
