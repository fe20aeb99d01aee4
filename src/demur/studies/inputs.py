"""What a study works on: model, SAEs, prompts, judge. Everything that can be checked cheaply is checked first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demur import data
from demur.errors import InputError
from demur.judges import Judge, get_judge
from demur.model import ChatModel, read_config
from demur.saes import Preset, Suite, find_preset, get_preset, load_saes, load_suite
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
    """Further suites of the same model by name, for a study that compares them (`against`)."""


def _preset(config: StudyConfig) -> Preset | None:
    """The preset that names the SAEs: the model's, or the one given with `--saes` (a fine-tune's original, say)."""
    return get_preset(str(config.model)) if config.saes is None else find_preset(config.saes)


def neuronpedia_source(config: StudyConfig) -> str | None:
    """Where Neuronpedia has the SAEs, `MODEL/SOURCE` with a `{layer}` to fill in; None where it does not. It holds one
    SAE a layer and width, that of the preset's average L0."""
    preset = find_preset(str(config.saes or config.model))
    if preset is None or preset.neuronpedia is None or config.average_l0 != preset.average_l0:
        return None
    return preset.neuronpedia.replace("{width}", config.sae_width or str(preset.width))


def with_paper_settings(config: ConfigT) -> ConfigT:
    """The configuration with the paper's settings filled in where they are asked for. Raises InputError: the model has
    no preset, or its preset is not the paper's."""
    if not getattr(config, "paper_settings", False):
        return config
    preset = _preset(config) or get_preset(str(config.model))
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
    suite.check(d_model=int(text.hidden_size), n_layers=int(text.num_hidden_layers))


BASE_SAES = "trained before safety training"
"""Name of the bundled SAEs that were trained on the model before it learned to refuse."""


def other_names(config: StudyConfig) -> tuple[str, ...]:
    """Names of the suites that a study compares with its own: what `against` names, and the bundled model's second."""
    given: tuple[str, ...] | None = getattr(config, "against", None)
    if given is None:
        return ()
    return given if config.model is not None else (BASE_SAES, *given)


def _other_suites(config: StudyConfig, model: ChatModel) -> dict[str, Suite]:
    from demur.bundled import bundled_path

    sources = {name: bundled_path().base_saes if name == BASE_SAES else name for name in other_names(config)}
    return {name: load_saes(model, source, layers=config.layers) for name, source in sources.items()}


def outcome_judge(name: str) -> Judge:
    """A judge that tells refusal from compliance. Raises InputError: there is no such judge, or it tells harm alone."""
    judge = get_judge(name)
    if "outcome" not in judge.gives:
        raise InputError(
            f"the judge {name!r} tells whether an answer is harmful, not whether it refuses, so it cannot be the "
            "outcome judge; give --judge patterns or refusal=MODEL, and this one to --harm-judges of `demur benchmark`"
        )
    return judge


def _model(config: StudyConfig, source: str | Path) -> ChatModel:
    options = ("revision", "dtype", "device", "system_prompt", "max_batch_tokens")
    return ChatModel.load(source, **{name: getattr(config, name) for name in options})


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


def load_inputs(config: StudyConfig) -> Inputs:
    """Load everything, in the order of what fails cheapest: judge, prompts, configurations, weights. Raises InputError,
    ModelError, SaeError: what is wrong with the inputs."""
    if config.model is None:
        from demur.bundled import BundledJudge, bundled_path

        place = bundled_path()
        judge = BundledJudge() if config.judge is None else outcome_judge(config.judge)
        splits = read_splits(config)
        suite = load_suite(place.saes, layers=config.layers, average_l0=config.average_l0)
        model = _model(config, place.model)
        others = _other_suites(config, model)
        return Inputs("the bundled model", "the bundled SAEs", model, suite, splits, judge, others=others)
    judge = outcome_judge(config.judge or "patterns")
    splits = read_splits(config)
    suite = configured_suite(config)
    check_fit(config, suite)
    model = _model(config, str(config.model))
    return Inputs(model.name, suite.source, model, suite, splits, judge, others=_other_suites(config, model))
