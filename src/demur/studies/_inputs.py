"""What a features study works on: model, SAEs, prompts, judge. Everything that can be checked cheaply is checked
first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demur import data
from demur.data import SplitSizes, listed
from demur.errors import InputError, ModelError
from demur.judges import JUDGES, Judge, get_judge
from demur.model import ChatModel, load_model
from demur.saes import Preset, Suite, find_preset, get_preset, load_suite
from demur.studies.config import ConfigT, PromptSource, StudyConfig
from demur.types import Label, Prompt, PromptSet, Splits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """A study's inputs, loaded."""

    title: str
    """The model's name, for people."""
    saes: str
    """The SAEs' name, for people."""
    model: ChatModel
    suite: Suite
    splits: Splits
    judge: Judge


def read_sets(sources: Sequence[PromptSource], label: Label, option: str) -> PromptSet:
    """Prompts of several files or named sets as one set; ids stay unique by the number of the file.

    `option` is the command line's option for them, as errors about columns name it (`--harmful` → `--harmful-column`).
    """
    sets = [
        data.read_prompts(source.source, label=label, column=source.column, column_option=f"{option}-column")
        for source in sources
    ]
    if len(sets) == 1:
        return sets[0]
    prompts = [
        prompt.model_copy(update={"id": f"{number}/{prompt.id}"})
        for number, prompts in enumerate(sets, start=1)
        for prompt in prompts
    ]
    return PromptSet(name="+".join(each.name for each in sets), prompts=tuple(_without_repeats(prompts)))


def _without_repeats(prompts: Sequence[Prompt]) -> list[Prompt]:
    seen: dict[str, Prompt] = {}
    for prompt in prompts:
        seen.setdefault(data.text_key(prompt.text), prompt)
    if len(seen) < len(prompts):
        logger.warning("%d prompts stand in more than one file and are used once", len(prompts) - len(seen))
    return list(seen.values())


def read_splits(config: StudyConfig) -> Splits:
    """The four splits of the configured prompts.

    Raises:
        InputError: a file cannot be read, holds too few prompts, or harmful and harmless prompts overlap.
    """
    return data.make_splits(
        read_sets(config.harmful, "harmful", "--harmful"),
        read_sets(config.harmless, "harmless", "--harmless"),
        sizes=_sizes(config),
        seed=config.seed,
        test_harmful=read_sets(config.test_harmful, "harmful", "--test-harmful") if config.test_harmful else None,
        test_harmless=read_sets(config.test_harmless, "harmless", "--test-harmless") if config.test_harmless else None,
    )


def check_fit(config: StudyConfig, suite: Suite) -> None:
    """Compare model and SAEs by their configurations alone, before any weight is read or downloaded.

    Raises:
        ModelError: the model's configuration cannot be read.
        SaeError: the SAEs' width or layers do not fit.
    """
    from transformers import AutoConfig

    name = str(config.model)
    try:
        found = AutoConfig.from_pretrained(name, **({"revision": config.revision} if config.revision else {}))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot read the configuration of {name!r}: {error}\nExpected a folder with config.json, or a hub id that "
            "you can reach (gated models need `hf auth login`)"
        ) from error
    text = found.get_text_config(decoder=True)
    suite.check(d_model=int(text.hidden_size), n_layers=int(text.num_hidden_layers))


def _preset(config: StudyConfig) -> Preset | None:
    """The preset that names the SAEs: the model's, or the one given with `--saes` (a fine-tune's original, say)."""
    return get_preset(str(config.model)) if config.saes is None else find_preset(config.saes)


def configured_suite(config: StudyConfig) -> Suite:
    """The SAEs of a model that is named: those of the preset, or of the folder or hub id given.

    Raises:
        InputError, SaeError: there is no preset, or no such SAEs.
    """
    preset = _preset(config)
    return load_suite(
        preset.saes if preset else str(config.saes),
        layers=config.layers or (preset.layers if preset else None),
        average_l0=config.average_l0,
        width=config.sae_width or (preset.width if preset else None),
        revision=config.saes_revision,
    )


def with_paper_settings(config: ConfigT) -> ConfigT:
    """The configuration with the paper's settings filled in where they are asked for.

    Raises:
        InputError: the model has no preset, or its preset is not the paper's.
    """
    if not config.paper_settings:
        return config
    preset = _preset(config) or get_preset(str(config.model))
    return config.with_settings(preset.study_settings())


def _sizes(config: StudyConfig) -> SplitSizes:
    return SplitSizes(
        direction=config.n_direction, selection=config.n_selection, tuning=config.n_tuning, test=config.n_test
    )


def _load_model(config: StudyConfig, source: str | Path) -> ChatModel:
    return load_model(
        source,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        system_prompt=config.system_prompt,
        max_batch_tokens=config.max_batch_tokens,
    )


def _bundled(config: StudyConfig) -> Inputs:
    """The bundled model, its SAEs, its prompts (test topics and phrasings held out of its training) and its judge."""
    from demur.bundled import BundledJudge, bundled_path, bundled_prompts

    place, prompts = bundled_path(), bundled_prompts()
    suite = load_suite(place.saes, layers=config.layers, average_l0=config.average_l0)
    splits = data.make_splits(
        prompts.harmful,
        prompts.harmless,
        sizes=_sizes(config),
        seed=config.seed,
        test_harmful=prompts.test_harmful,
        test_harmless=prompts.test_harmless,
    )
    judge = BundledJudge() if config.judge is None else _outcome_judge(config.judge)
    return Inputs("the bundled model", "the bundled SAEs", _load_model(config, place.model), suite, splits, judge)


def _outcome_judge(name: str) -> Judge:
    """A judge that tells refusal from compliance.

    Raises:
        InputError: there is no such judge, or it tells harm alone.
    """
    judge = get_judge(name)
    if "outcome" not in judge.gives:
        fit = listed(tuple(each for each in JUDGES if "outcome" in JUDGES[each].gives))
        raise InputError(
            f"the judge {name!r} tells whether an answer is harmful, not whether it refuses, so it cannot be the "
            f"outcome judge; give --judge one of {fit}, and this one to --harm-judge of `demur benchmark`"
        )
    return judge


def load_inputs(config: StudyConfig) -> Inputs:
    """Load everything, in the order of what fails cheapest: judge, prompts, configurations, weights.

    Raises:
        InputError, ModelError, SaeError: what is wrong with the inputs.
    """
    if config.model is None:
        return _bundled(config)
    judge = _outcome_judge(config.judge or "patterns")
    splits = read_splits(config)
    suite = configured_suite(config)
    check_fit(config, suite)
    model = _load_model(config, str(config.model))
    return Inputs(model.name, suite.source, model, suite, splits, judge)


__all__ = ["Inputs", "check_fit", "configured_suite", "load_inputs", "read_sets", "read_splits"]
