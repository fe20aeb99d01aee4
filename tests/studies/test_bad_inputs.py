"""Inputs that cannot be used: each is named, with what was expected and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demur.studies.features import run_features
from safetensors.torch import load_file, save_file

from demur.errors import DemurError, InputError, ModelError, RunError, SaeError
from demur.saes import DenseSae
from demur.studies.config import PromptSource


def _fails(config: Any, out: Path, kind: type[DemurError], *words: str) -> str:
    with pytest.raises(kind) as error:
        run_features(config, out)
    for word in words:
        assert word in str(error.value)
    return str(error.value)


def _source(path: Path, column: str | None = None) -> tuple[PromptSource, ...]:
    return (PromptSource(source=str(path), column=column),)


def test_an_empty_file(files: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    _fails(files.config(harmful=_source(empty)), tmp_path / "run", InputError, "empty.txt")


def test_a_wrong_column(files: Any, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("number,request\n1,Steal a car\n")
    message = _fails(
        files.config(harmful=_source(table, "requests")), tmp_path / "run", InputError, "table.csv", "number"
    )
    assert "'request'" in message


def test_not_utf_8(files: Any, tmp_path: Path) -> None:
    bad = tmp_path / "latin.txt"
    bad.write_bytes(b"Steal a car\nBake a g\xe2teau\n")
    _fails(files.config(harmful=_source(bad)), tmp_path / "run", InputError, "latin.txt", "line 2")


def test_the_same_file_twice(files: Any, tmp_path: Path) -> None:
    same = _source(files.folder / "harmful.jsonl")
    _fails(files.config(harmless=same), tmp_path / "run", InputError, "given twice")


def test_a_prompt_longer_than_the_context(files: Any, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("\n".join([*files.truth.harmful.texts, " ".join(["steal"] * 5000)]))
    _fails(
        files.config(harmful=_source(long), n_direction=25),
        tmp_path / "run",
        InputError,
        "tokens long",
        "context holds",
    )


def test_nan_in_the_model(files: Any, tmp_path: Path) -> None:
    shutil.copytree(files.folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "layers.2" in name and tensors[name].ndim == 2)
    tensors[name][3, 5] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    _fails(files.config(model=str(tmp_path / "model")), tmp_path / "run", ModelError, name, "NaN", "(3, 5)")


def test_nan_in_an_sae(files: Any, tmp_path: Path) -> None:
    shutil.copytree(files.folder / "saes", tmp_path / "saes")
    path = next((tmp_path / "saes" / "layer_1").rglob("params.npz"))
    with np.load(path) as file:
        arrays = dict(file)
    arrays["W_dec"][7, 2] = np.nan
    np.savez(path, **arrays)
    _fails(files.config(saes=str(tmp_path / "saes")), tmp_path / "run", SaeError, "params.npz", "W_dec")


def test_an_sae_of_the_wrong_width(files: Any, tmp_path: Path) -> None:
    _sae(layer=0, d_model=12).save_gemma_scope(tmp_path / "saes", average_l0=5.0)
    _fails(files.config(saes=str(tmp_path / "saes")), tmp_path / "run", SaeError, "12", "64")


def _sae(layer: int, d_model: int) -> DenseSae:
    eye = torch.eye(d_model)
    return DenseSae(layer, eye, torch.zeros(d_model), torch.zeros(d_model), None, eye, torch.zeros(d_model))


def test_an_sae_for_a_layer_that_the_model_lacks(files: Any, tmp_path: Path) -> None:
    _sae(layer=9, d_model=64).save_gemma_scope(tmp_path / "saes", average_l0=5.0)
    _fails(files.config(saes=str(tmp_path / "saes")), tmp_path / "run", SaeError, "9")


def test_a_missing_layer(files: Any, tmp_path: Path) -> None:
    _fails(files.config(layers=(0, 7)), tmp_path / "run", SaeError, "7")


def test_a_model_without_a_chat_template(files: Any, tmp_path: Path) -> None:
    shutil.copytree(files.folder / "model", tmp_path / "model")
    for path in (tmp_path / "model").glob("*.jinja"):
        path.unlink()
    _fails(files.config(model=str(tmp_path / "model")), tmp_path / "run", ModelError, "no chat template")


def test_an_unknown_judge(files: Any, tmp_path: Path) -> None:
    _fails(files.config(judge="paterns"), tmp_path / "run", InputError, "paterns", "patterns")


def test_no_preset_for_the_model(files: Any, tmp_path: Path) -> None:
    _fails(files.config(saes=None, model="google/gemma-2-2b"), tmp_path / "run", InputError, "google/gemma-2-2b-it")


def test_a_model_that_is_not_there(files: Any, tmp_path: Path) -> None:
    message = _fails(files.config(model=str(tmp_path / "nowhere")), tmp_path / "run", ModelError, "nowhere")
    assert "config.json" in message


def test_a_folder_that_cannot_be_written(files: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    _fails(files.config(), file / "run", RunError, "--out")


def test_too_few_prompts(files: Any, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("Steal a car\nRob a bank\n")
    _fails(files.config(harmful=_source(few)), tmp_path / "run", InputError, "few", "2 prompts")


def test_nothing_is_lost_by_an_error(files: Any, tmp_path: Path) -> None:
    """A run that fails late keeps what it had: put right, it goes on from there."""
    shutil.copytree(files.folder / "saes", tmp_path / "saes")
    shutil.rmtree(tmp_path / "saes" / "layer_2")
    path = next((tmp_path / "saes" / "layer_1").rglob("params.npz"))
    good = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    arrays["W_dec"][:] = np.nan
    np.savez(path, **arrays)
    config = files.config(saes=str(tmp_path / "saes"))
    _fails(config, tmp_path / "run", SaeError, "params.npz")
    path.write_bytes(good)
    stages: list[str] = []
    run_features(config, tmp_path / "run", lambda stage, *_: stages.append(stage) if stage != "loading" else None)
    assert not any(stage.startswith(("baseline", "direction")) for stage in stages)


def test_a_judge_of_harm_cannot_tell_outcomes(files: Any, tmp_path: Path) -> None:
    words = ("'harmbench'", "--judge one of 'patterns', 'wildguard'", "--harm-judge")
    _fails(files.config(judge="harmbench"), tmp_path / "run", InputError, *words)
