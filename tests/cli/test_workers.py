"""How many processes a study takes where nobody says it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from demur.cli.workers import MOST, fitting_workers
from demur.model import SMALL_MODEL
from demur.studies import STUDIES
from demur.studies.config import StudyConfig
from demur.testing import save_tiny


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of sixteen cores without a GPU."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def asked(**settings: object) -> StudyConfig:
    prompts = {"harmful": ("any",), "harmless": ("any",)} if settings.get("model") else {}
    return STUDIES["benchmark"].config(**({"device": "cpu"} | prompts | settings))


def test_a_small_model_on_a_cpu_has_a_process_for_each_core_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitting_workers(asked()) == MOST
    assert fitting_workers(asked(judge="patterns")) == MOST
    for threads, processes in (("1", 1), ("3", 3), ("40", MOST)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert fitting_workers(asked()) == processes


def test_larger_models_other_judges_and_gpus_have_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_tiny("llama3", tmp_path)
    assert fitting_workers(asked(model=str(tmp_path))) == MOST
    assert fitting_workers(asked(model="owner/name")) == 1
    assert fitting_workers(asked(judge="refusal=owner/name")) == 1
    assert fitting_workers(asked(harm_judges=("harmbench=owner/name",))) == 1
    with (tmp_path / "model-2.safetensors").open("wb") as file:
        file.truncate(2 * SMALL_MODEL)
    assert fitting_workers(asked(model=str(tmp_path))) == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert fitting_workers(asked(device="auto")) == 1
