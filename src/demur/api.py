"""The functions that `import demur` offers beside the values: the method in a few lines, on objects in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from demur import data as _data
from demur import saes as _saes
from demur.errors import InputError
from demur.method.activations import mean_max_activations
from demur.method.direction import Direction
from demur.method.interventions import Compiled, ScaleFeatures, SetFeatures, Where
from demur.model import ChatModel
from demur.saes import Suite
from demur.studies import STUDIES
from demur.studies.base import Study, StudyResult, data_frame
from demur.studies.compare import run_comparison
from demur.studies.config import CompareConfig, StudyConfig, load_config
from demur.studies.context import Context, open_context, run_study
from demur.studies.explain import Explanation
from demur.studies.explain import explain as _explain
from demur.studies.inputs import Inputs, outcome_judge, read_splits
from demur.studies.pipeline import Found, find
from demur.studies.results import CompareResult
from demur.types import FeatureSet, Splits

if TYPE_CHECKING:
    import pandas

    from demur.judges import Judge


def load_model(source: str | Path | None = None, **options: Any) -> ChatModel:
    """Load a chat model from `source`, a folder or hub id (default: the bundled model). `options` are those of
    `ChatModel.load`: `revision`, `dtype`, `device`, `system_prompt`, `max_batch_tokens`. Raises ModelError: the model
    or its tokenizer cannot be loaded."""
    return ChatModel.load(_bundled().model if source is None else source, **options)


def load_saes(model: ChatModel, source: str | Path | None = None, **options: Any) -> Suite:
    """Load the SAEs of a model from `source`, a folder or hub id (default: the preset of the model, or the bundled
    model's own). `options` are those of `demur.saes.load_saes`: `layers`, `average_l0`, `width`, `revision`. Raises
    InputError: the model has no preset; name a source; SaeError: the SAEs cannot be read, or do not fit the model."""
    if source is None and is_bundled(model):
        source = _bundled().saes
    return _saes.load_saes(model, source, **options)


Sources = str | Path | Sequence[str | Path]


def load_prompts(harmful: Sources | None = None, harmless: Sources | None = None, **options: Any) -> Splits:
    """Harmful and harmless prompts in four splits, from files or named sets, `SOURCE` or `SOURCE::COLUMN` (default: the
    bundled model's). `options` are `n`, `seed` and, for sources, `test_harmful` and `test_harmless`. Raises InputError:
    a source cannot be used or is missing, or too few prompts are left."""
    if harmful is None and harmless is None:
        return read_splits(load_config(None, options, StudyConfig))
    if harmful is None or harmless is None:
        raise InputError(f"no {'harmful' if harmful is None else 'harmless'} prompts are named; give both, or neither")
    # As a study reads them: `n` may be "128,32,32,100" or "test=50".
    own = load_config(None, {name: options.pop(name) for name in ("n", "seed") if name in options}, StudyConfig)
    return _data.load_prompts(harmful, harmless, n=own.n, seed=own.seed, **options)


def is_bundled(model: ChatModel) -> bool:
    """Whether this is the model that comes with demur."""
    return model.name == str(_bundled().model)


def _bundled() -> Any:
    from demur.bundled import bundled_path

    return bundled_path()


@dataclass(frozen=True)
class FoundFeatures:
    """F*, bound to the model and the SAEs in which it was found. `steps` are the clean answers, the direction, the pool
    and the attribution on the way to it."""

    model: ChatModel
    saes: Suite
    steps: Found

    @property
    def features(self) -> FeatureSet:
        """F*, best first."""
        return self.steps.chosen

    @property
    def direction(self) -> Direction:
        return self.steps.direction

    def __len__(self) -> int:
        return len(self.features)

    def scale(self, factor: float, where: Where = "all") -> Compiled:
        """`f ← factor·f` on F*: 0 removes the features, negative factors reverse them. For `model.intervene`."""
        return Compiled(self.model, self.saes, [ScaleFeatures(self.features.features, factor, where)])

    def set(self, multiple: float, where: Where = "prompt") -> Compiled:
        """`f ← multiple · its mean maximum activation on harmful prompts`, for each feature of F*. For
        `model.intervene`."""
        harmful, features = self.model.tokenize(self.steps.clean.used("selection").harmful), self.features.features
        values = multiple * mean_max_activations(self.model, self.saes, harmful, features)
        return Compiled(self.model, self.saes, [SetFeatures(features, tuple(values.tolist()), where)])

    def ablate_direction(self) -> Compiled:
        """The refusal direction projected out of every layer. For `model.intervene`."""
        return Compiled(self.model, None, [self.direction.ablate()])

    def to_frame(self) -> pandas.DataFrame:
        """Layer, index, score and cosine of each feature, best first. Raises DemurError: pandas is not installed."""
        pool = self.steps.pool
        return data_frame(
            {"layer": f.layer, "index": f.index, "score": score, "cosine": pool.cosine(f)}
            for f, score in zip(self.features.features, self.features.scores, strict=True)
        )

    def __repr__(self) -> str:
        best = ", ".join(str(feature) for feature in self.features.features[:5])
        more = ", …" if len(self) > 5 else ""
        where = f"layer {self.direction.layer}, position {self.direction.position}, {self.direction.form}"
        return f"F*: {len(self)} features ({best}{more}); direction: {where}"


def find_features(
    model: ChatModel,
    saes: Suite,
    prompts: Splits,
    *,
    k: int = 20,
    judge: str | Judge | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> FoundFeatures:
    """The few SAE features that mediate refusal (paper, section 3). No test prompt is looked at. Raises ModelError: the
    model never refuses, or nothing in it moves the metric; says what to do.

    Args:
        model: the chat model.
        saes: SAEs of its residual stream.
        prompts: harmful and harmless prompts in four splits, of `load_prompts`.
        k: features to keep.
        judge: outcome judge, or its name (default: "patterns"; the bundled model has its own).
        out: run folder in which steps are kept and found again (default: none is kept).
        options: further options of `demur study`, such as `k0`, `estimator` or `direction_layer`.
    """
    with _context(model, saes, prompts, judge, out, {"k": k, **options}) as context:
        return FoundFeatures(model, saes, find(context, context.splits.choosing))


def compare(
    model: ChatModel,
    saes: Suite,
    prompts: Splits,
    found: FoundFeatures | None = None,
    *,
    methods: Sequence[str] | None = None,
    judge: str | Judge | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> CompareResult:
    """What suppressing and inducing F* does on held-out prompts, beside random controls and other methods (paper,
    section 4.1). Raises DemurError: inputs that do not fit. Arguments are as for `find_features`, and:

    Args:
        found: F*, of `find_features` (default: found first).
        methods: methods beside F* (default: those of `demur study`: controls and the direction).
        options: further options of `demur study`, or of `demur benchmark` where `study="benchmark"` is given.
    """
    given = dict(options)
    if found is not None:
        given.setdefault("k", len(found))
    if methods is not None:
        given["methods"] = tuple(methods)
    with _context(model, saes, prompts, judge, out, given) as context:
        return context.completed(run_comparison(context, None if found is None else found.steps))


def run(
    name: str,
    *,
    inputs: Inputs | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    **options: Any,
) -> StudyResult:
    """Run a study as its command does, and give its result. Raises DemurError: inputs that do not fit.

    Args:
        name: such as "study" or "benchmark".
        inputs: model, SAEs, prompts and judge where they are at hand (default: loaded as the options say).
        out: run folder (default: none is kept).
        config: TOML file of options.
        options: the study's options.
    """
    study = STUDIES[name]
    settings = load_config(None if config is None else Path(config), options, study.config)
    with _folder(out) as folder:
        return run_study(study, settings, folder, inputs=inputs)


def explain(run: str | Path, prompt: str, plain: str | None = None) -> Explanation:
    """Why the model answers, or refuses, one prompt, by the features that a study found: its tokens, the signals of
    harm and refusal, its words, and what restoring features does. Raises RunError: no study of this folder found
    features.

    Args:
        run: folder of a finished study, such as `demur study --out FOLDER` writes.
        prompt: the message to explain.
        plain: the same request put plainly, to compare with.
    """
    return _explain(run, prompt, plain)


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with TemporaryDirectory(prefix="demur-") as folder:
        yield Path(folder) / "run"


@contextmanager
def _context(
    model: ChatModel, saes: Suite, prompts: Splits, judge: str | Judge | None, out: str | Path | None, options: Any
) -> Iterator[Context[Any]]:
    """A context on objects in memory."""
    study: Study[Any, Any] = STUDIES[options.pop("study", "study")]
    # What is in memory cannot be named by options; a model that is named wants prompts that are named too.
    config: CompareConfig = load_config(None, options, study.config)
    if judge is None and is_bundled(model):
        from demur.bundled import BundledJudge

        judge = BundledJudge()
    elif judge is None or isinstance(judge, str):
        judge = outcome_judge(judge or "patterns")
    inputs = Inputs(model.name, saes.source, model, saes, prompts, judge)
    with _folder(out) as folder, open_context(study, config, folder, inputs=inputs) as context:
        yield context
