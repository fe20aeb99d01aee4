"""What a benchmark reads besides a study's inputs: plain texts, prompts that only look harmful, tasks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import ceil

from demur import data
from demur.errors import InputError
from demur.method.likelihood import texts_to_score
from demur.model import TokenizedPrompt
from demur.studies._context import Study
from demur.studies._inputs import read_sets
from demur.studies.benchmark.config import BenchmarkConfig
from demur.types import Prompt, PromptSet


@dataclass(frozen=True)
class Extras:
    """Read and checked."""

    texts: tuple[TokenizedPrompt, ...]
    """Plain texts as tokens."""
    over_refusal: PromptSet | None

    @classmethod
    def read(cls, config: BenchmarkConfig, study: Study) -> Extras:
        """Everything that the configuration names, so that mistakes are found before anything is computed.

        Raises:
            InputError: a file cannot be read, holds nothing to measure, or a task cannot be found.
            DemurError: tasks are asked for without the extra that they need.
        """
        texts = [Prompt(id=f"text {n}", text=text) for n, text in enumerate(_texts(config))]
        items = texts_to_score(study.inputs.model, texts, max_tokens=config.text_tokens)
        if config.tasks:
            from demur.capability import check_tasks

            check_tasks(config.tasks)
        return cls(tuple(items), _over_refusal(config, study))


def _texts(config: BenchmarkConfig) -> tuple[str, ...]:
    """Plain text: of each configured source as many, or the bundled model's own."""
    if config.text:
        share = ceil(config.n_text / len(config.text))
        found = [
            text
            for each in config.text
            for text in data.read_texts(each.source, column=each.column, limit=share, column_option="--text-column")
        ]
        return tuple(found[: config.n_text])
    if config.model is None:
        from demur.bundled import bundled_texts

        return bundled_texts(config.n_text)
    return ()


def _over_refusal(config: BenchmarkConfig, study: Study) -> PromptSet | None:
    """A sample of the harmless prompts that look harmful; those that chose anything are left out.

    A sample, since such sets are sorted by kind: the first of XSTest would be four of its ten.
    """
    if config.over_refusal:
        found = read_sets(config.over_refusal, "harmless", "--over-refusal")
    elif config.model is None:
        from demur.bundled import bundled_prompts

        found = bundled_prompts().over_refusal
    else:
        return None
    splits = study.inputs.splits
    used = {
        data.text_key(prompt.text)
        for split in (splits.direction, splits.selection, splits.tuning)
        for prompts in (split.harmful, split.harmless)
        for prompt in prompts
    }
    kept = [prompt for prompt in found.prompts if data.text_key(prompt.text) not in used]
    if not kept:
        raise InputError(
            "every prompt of --over-refusal is also among the prompts that choose something; name another set"
        )
    if len(kept) > config.n_over_refusal:
        kept = random.Random(config.seed).sample(kept, config.n_over_refusal)
    return PromptSet(name=found.name, prompts=tuple(kept))


__all__ = ["Extras"]
