"""The planted model as files, as a user would have them, and studies of it that take seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from demur.studies import STUDIES
from demur.studies.config import load_config
from demur.studies.context import run_study
from demur.studies.results import CompareResult, EffectRow
from demur.testing import Planted, planted


def write_prompts(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@dataclass(frozen=True)
class PlantedFiles:
    """A model whose causal features are known, its SAEs and its prompts, in a folder."""

    folder: Path
    truth: Planted

    def options(self, **changes: Any) -> dict[str, Any]:
        """Options of a study that takes seconds."""
        return {
            "model": str(self.folder / "model"),
            "saes": str(self.folder / "saes"),
            "harmful": str(self.folder / "harmful.jsonl"),
            "harmless": str(self.folder / "harmless.jsonl"),
            "device": "cpu",
            "n": "20,16,8,20",
            "k": len(self.truth.truth.causal),
            "n_exact": 4,
            "max_new_tokens": 8,
            "random_sets": 2,
            **changes,
        }

    def small(self, **changes: Any) -> dict[str, Any]:
        """The smallest options that still have every stage."""
        small = {"n": "12,6,4,6", "n_exact": 0, "suppress": "0", "induce_multiples": "1"}
        return self.options(**{**small, **changes})

    def study(self, out: Path, name: str = "study", progress: Any = None, **changes: Any) -> CompareResult:
        """Run a study with `options`."""
        study = STUDIES[name]
        # A study that compares nothing has no settings of a comparison.
        asked = {key: value for key, value in self.options(**changes).items() if key in study.config.model_fields}
        return run_study(study, load_config(None, asked, study.config), out, progress=progress)


@pytest.fixture(scope="session", name="files")
def planted_files(tmp_path_factory: pytest.TempPathFactory) -> PlantedFiles:
    folder = tmp_path_factory.mktemp("planted")
    found = planted()
    found.model.save_pretrained(folder / "model")
    found.tokenizer.save_pretrained(folder / "model")
    for layer in found.suite.layers:
        found.suite[layer].dense().save_gemma_scope(folder / "saes", average_l0=5.0)
    write_prompts(folder / "harmful.jsonl", found.harmful.texts)
    write_prompts(folder / "harmless.jsonl", found.harmless.texts)
    return PlantedFiles(folder, found)


def lasting(result: CompareResult) -> str:
    """A result without what differs from process to process, as JSON: nan equals nan there."""
    return result.model_copy(update={"seconds": {}, "counters": {}, "usage": {}, "peak_memory": 0}).model_dump_json()


def effect(result: CompareResult, prompts: Any, kind: Any, method: str) -> EffectRow:
    """The row of a method at its chosen strength."""
    row = result.effect(prompts, kind, method)
    assert row is not None, (prompts, kind, method)
    return row
