"""Local tasks of lm-evaluation-harness: a file of documents and the YAML file that reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHOICES = [
    {"query": "Where does the bread go?", "choices": ["In the oven", "Under a train", "To the garden"], "gold": 0},
    {"query": "Who plays the guitar in the spring?", "choices": ["A window", "A friend of the late train"], "gold": 1},
    {"query": "Say three", "choices": ["three", "two", "one", "a list of steps"], "gold": 0},
    {"query": "What is quiet, and why does it work?", "choices": ["The best way to clean", "Bread"], "gold": 1},
    {"query": "Plan a story", "choices": ["Sure, here it is", "I cannot help with that"], "gold": 0},
]


def write_task(folder: Path, name: str, docs: Sequence[Mapping[str, Any]], **config: Any) -> Path:
    """A task over `docs`; JSON is YAML. The data's cache stays in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    return write_reader(folder, name, data, **config)


def write_reader(folder: Path, name: str, data: Path, **config: Any) -> Path:
    """A task that reads a JSONL file which is already there."""
    whole = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "metadata": {"version": 1.5},
        **config,
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    return file


def multiple_choice(folder: Path, name: str = "pick", docs: Sequence[Mapping[str, Any]] = CHOICES) -> Path:
    return write_task(folder, name, docs, **as_choices())


def as_choices() -> dict[str, Any]:
    """How to ask documents of the form of `CHOICES`."""
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "fewshot_split": "test",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }


def given_answers(folder: Path, docs: Sequence[tuple[str, str]], name: str = "given") -> Path:
    """Log-likelihoods of given answers: the perplexity is exp(−mean of the answers' log-likelihoods in nats)."""
    return write_task(
        folder,
        name,
        [{"text": text, "answer": answer} for text, answer in docs],
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target="{{answer}}",
        target_delimiter="",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    )


def written_answers(
    folder: Path, docs: Sequence[tuple[str, str]], new: int, name: str = "write", **config: Any
) -> Path:
    """Greedy answers of at most `new` tokens, which must match the expected ones exactly."""
    return write_task(
        folder,
        name,
        [{"text": text, "answer": answer} for text, answer in docs],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{answer}}",
        fewshot_split="test",
        generation_kwargs={"until": ["@@@"], "do_sample": False, "max_gen_toks": new},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **config,
    )
