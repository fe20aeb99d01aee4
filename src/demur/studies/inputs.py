"""What a study works on: model, SAEs, prompts, judge. Everything that can be checked cheaply is checked first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from demur import data
from demur.errors import InputError
from demur.judges import Judge, get_judge
from demur.model import ChatModel, read_config
from demur.saes import Suite, find_preset, get_preset, load_saes, load_suite
from demur.studies.config import ConfigT, StudyConfig
from demur.types import Splits


@dataclass(frozen=True)
class Inputs:
    """A study's inputs, loaded: titles are names for people, `judge` is the outcome judge."""

    title: str
    saes_title: str
    model: ChatModel
    suite: Suite
    splits: Splits
    judge: Judge
    warnings: tuple[str, ...] = ()
    others: Mapping[str, Suite] = field(default_factory=dict[str, Suite])
    """Further suites of the same model by name, for a study that compares them (`against`, `to_saes`)."""
    before: Mapping[str, Inputs] = field(default_factory=dict[str, Any])
    """Other checkpoints of the model by name, each with its SAEs and the same prompts and judge (`before`)."""


def neuronpedia_source(config: StudyConfig) -> str | None:
    """Where Neuronpedia has the SAEs, `MODEL/SOURCE` with a `{layer}` to fill in; None where it does not. It holds one
    SAE a layer and width, that of the preset's average L0."""
    preset = find_preset(str(config.saes or config.model))
    if preset is None or preset.neuronpedia is None or config.average_l0 != preset.average_l0:
        return None
    return preset.neuronpedia.replace("{width}", config.sae_width or str(preset.width))


def with_paper_settings(config: ConfigT) -> ConfigT:
    """The configuration with the paper's settings filled in where they are asked for: those of the preset given with
    `--saes` (a fine-tune's original, say), or of the model's. Raises InputError: there is no preset, or it is not the
    paper's."""
    if not getattr(config, "paper_settings", False):
        return config
    preset = (config.saes and find_preset(config.saes)) or get_preset(str(config.model))
    return config.with_settings(preset.study_settings())


def configured_suite(config: StudyConfig) -> Suite:
    """The SAEs of a named model: those of its preset, or of the folder or hub id given. Raises InputError, SaeError:
    there is no preset, or no such SAEs."""
    asked: dict[str, Any] = {"width": config.sae_width, "revision": config.saes_revision}
    return load_saes(str(config.model), config.saes, layers=config.layers, average_l0=config.average_l0, **asked)


def check_fit(config: StudyConfig, suite: Suite) -> None:
    """Compare model and SAEs by their configurations alone, before any weight is read or downloaded. Raises ModelError:
    the model's configuration cannot be read; SaeError: the SAEs' width or layers do not fit."""
    text = read_config(str(config.model), config.revision).get_text_config(decoder=True)
    sizes = {"d_model": int(text.hidden_size), "n_layers": int(text.num_hidden_layers)}
    suite.check(**sizes, model_type=str(text.model_type))


BASE_SAES = "trained before safety training"
"""Name of the bundled SAEs that were trained on the model before it learned to refuse."""


def other_names(config: StudyConfig) -> tuple[str, ...]:
    """Names of the suites that a study compares with its own: what `against` or `to_saes` names, and the bundled
    model's second."""
    given: tuple[str, ...] | None = getattr(config, "against", getattr(config, "to_saes", None))
    if given is None:
        return ()
    return given if config.model is not None else (BASE_SAES, *given)


def _other_suites(config: StudyConfig, model: ChatModel, check: Callable[[Suite], None]) -> dict[str, Suite]:
    from demur.bundled import bundled_path

    sources = {name: bundled_path().base_saes if name == BASE_SAES else name for name in other_names(config)}
    found = {name: load_saes(model, source, layers=config.layers) for name, source in sources.items()}
    for suite in found.values():
        check(suite)
    return found


HELPFUL = "before safety training"
"""Name of the bundled model's earlier checkpoint, which complies with everything."""


def before_names(config: StudyConfig) -> tuple[str, ...]:
    """Names of the checkpoints that a study compares its model with: what `before` names, or the bundled model's."""
    given: tuple[str, ...] | None = getattr(config, "before", None)
    return () if given is None else given or ((HELPFUL,) if config.model is None else ())


def _checkpoint(name: str) -> dict[str, Any]:
    """Where a checkpoint is: a folder, a hub id, or `ID@REVISION`."""
    from demur.bundled import bundled_path

    source, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    return {"source": bundled_path().helpful_model if name == HELPFUL else source, "revision": revision or None}


def _check_checkpoints(config: StudyConfig, after: str | Path) -> None:
    """Raises InputError, by configurations alone: a checkpoint is another model than the one studied."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    texts: dict[str, Any] = {}
    for name in before_names(config):
        place = _checkpoint(name)
        texts[name] = read_config(str(place["source"]), place["revision"]).get_text_config(decoder=True)
    own = read_config(str(after), config.revision).get_text_config(decoder=True) if texts else None
    for name, text in texts.items():
        if apart := [f"{each} {getattr(text, each)}, not {getattr(own, each)}" for each in names
                     if getattr(text, each) != getattr(own, each)]:  # fmt: skip
            raise InputError(
                f"--before {name} is no checkpoint of {after}: {', '.join(apart)}; name an earlier or later state of "
                "the same model"
            )


def _before(config: StudyConfig, after: Inputs) -> dict[str, Inputs]:
    """The other checkpoints, read with the studied model's tokenizer and chat template: the same prompts are the same
    tokens, and a base model has no template of its own."""
    saes, found = getattr(config, "before_saes", None), dict[str, Inputs]()
    for name in before_names(config):
        model = _model(config, tokenizer=after.model.tokenizer, **_checkpoint(name))
        suite = after.suite
        if saes is not None:
            suite = load_saes(model, saes, layers=config.layers, average_l0=config.average_l0)
        found[name] = replace(after, title=name, saes_title=suite.source, model=model, suite=suite)
    return found


def outcome_judge(name: str) -> Judge:
    """A judge that tells refusal from compliance. Raises InputError: there is no such judge, or it tells harm alone."""
    judge = get_judge(name)
    if "outcome" not in judge.gives:
        raise InputError(
            f"the judge {name!r} tells whether an answer is harmful, not whether it refuses, so it cannot be the "
            "outcome judge; give --judge patterns or refusal=MODEL, and this one to --harm-judges of `demur benchmark`"
        )
    return judge


def _model(config: StudyConfig, source: str | Path, **given: Any) -> ChatModel:
    names = ("revision", "dtype", "device", "system_prompt", "max_batch_tokens")
    return ChatModel.load(source, **{name: getattr(config, name) for name in names} | given)


def read_splits(config: StudyConfig) -> Splits:
    """The four splits of the configured prompts, or of the bundled model's. Raises InputError: a file cannot be read,
    holds too few prompts, or harmful and harmless prompts overlap."""
    if config.model is None:
        from demur.bundled import bundled_prompts

        prompts = bundled_prompts()
        tests = {"test_harmful": prompts.test_harmful, "test_harmless": prompts.test_harmless}
        return data.make_splits(prompts.harmful, prompts.harmless, sizes=config.n, seed=config.seed, **tests)
    tests = {"test_harmful": config.test_harmful or None, "test_harmless": config.test_harmless or None}
    return data.load_prompts(config.harmful, config.harmless, n=config.n, seed=config.seed, **tests)


def load_inputs(config: StudyConfig, check: Callable[[Suite], None] = lambda _suite: None) -> Inputs:
    """Load everything, in the order of what fails cheapest: judge, prompts, configurations, weights. `check` is called
    with the SAEs before the model is loaded, and with each other suite. Raises InputError, ModelError, SaeError: what
    is wrong with the inputs."""
    if config.model is None:
        from demur.bundled import BundledJudge, bundled_path

        place = bundled_path()
        judge = BundledJudge() if config.judge is None else outcome_judge(config.judge)
        splits = read_splits(config)
        suite = load_suite(place.saes, layers=config.layers, average_l0=config.average_l0)
        _check_checkpoints(config, place.model)
        model = _model(config, place.model)
        others = _other_suites(config, model, check)
        found = Inputs("the bundled model", "the bundled SAEs", model, suite, splits, judge, others=others)
        return replace(found, before=_before(config, found))
    judge = outcome_judge(config.judge or "patterns")
    splits = read_splits(config)
    suite = configured_suite(config)
    check_fit(config, suite)
    check(suite)
    _check_checkpoints(config, str(config.model))
    model = _model(config, str(config.model))
    others = _other_suites(config, model, check)
    found = Inputs(model.name, suite.source, model, suite, splits, judge, others=others)
    return replace(found, before=_before(config, found))
