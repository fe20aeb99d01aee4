"""Inputs that cannot be used: each is named, with what was expected and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from demur.errors import DemurError, InputError, ModelError, RunError, SaeError
from demur.saes import DenseSae


def _fails(files: Any, out: Path, kind: type[DemurError], *words: str, **changes: Any) -> str:
    with pytest.raises(kind) as error:
        files.study(out, **changes)
    for word in words:
        assert word in str(error.value)
    return str(error.value)


def test_an_empty_file(files: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    _fails(files, tmp_path / "run", InputError, "empty.txt", harmful=str(empty))


def test_a_wrong_column(files: Any, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("number,request\n1,Steal a car\n")
    message = _fails(files, tmp_path / "run", InputError, "table.csv", "number", harmful=f"{table}::requests")
    assert "'request'" in message


def test_not_utf_8(files: Any, tmp_path: Path) -> None:
    bad = tmp_path / "latin.txt"
    bad.write_bytes(b"Steal a car\nBake a g\xe2teau\n")
    _fails(files, tmp_path / "run", InputError, "latin.txt", "line 2", harmful=str(bad))


def test_the_same_file_twice(files: Any, tmp_path: Path) -> None:
    same = str(files.folder / "harmful.jsonl")
    _fails(files, tmp_path / "run", InputError, "given twice", harmless=same)


def test_a_prompt_longer_than_the_context(files: Any, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("\n".join([*files.truth.harmful.texts, " ".join(["steal"] * 5000)]))
    _fails(files, tmp_path / "run", InputError, "tokens long", "context holds", harmful=str(long), n="25,16,8,20")


def test_nan_in_the_model(files: Any, tmp_path: Path) -> None:
    shutil.copytree(files.folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "layers.2" in name and tensors[name].ndim == 2)
    tensors[name][3, 5] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    _fails(files, tmp_path / "run", ModelError, name, "NaN", "(3, 5)", model=str(tmp_path / "model"))


def test_nan_in_an_sae(files: Any, tmp_path: Path) -> None:
    shutil.copytree(files.folder / "saes", tmp_path / "saes")
    path = next((tmp_path / "saes" / "layer_1").rglob("params.npz"))
    with np.load(path) as file:
        arrays = dict(file)
    arrays["W_dec"][7, 2] = np.nan
    np.savez(path, **arrays)
    _fails(files, tmp_path / "run", SaeError, "params.npz", "W_dec", saes=str(tmp_path / "saes"))


def test_an_sae_of_the_wrong_width(files: Any, tmp_path: Path) -> None:
    _sae(layer=0, d_model=12).save_gemma_scope(tmp_path / "saes", average_l0=5.0)
    _fails(files, tmp_path / "run", SaeError, "12", "64", saes=str(tmp_path / "saes"))


def _sae(layer: int, d_model: int) -> DenseSae:
    eye = torch.eye(d_model)
    return DenseSae(layer, eye, torch.zeros(d_model), None, eye, k=None, b_dec=torch.zeros(d_model))


def test_an_sae_for_a_layer_that_the_model_lacks(files: Any, tmp_path: Path) -> None:
    _sae(layer=9, d_model=64).save_gemma_scope(tmp_path / "saes", average_l0=5.0)
    _fails(files, tmp_path / "run", SaeError, "9", saes=str(tmp_path / "saes"))


def test_a_missing_layer(files: Any, tmp_path: Path) -> None:
    _fails(files, tmp_path / "run", SaeError, "7", layers=(0, 7))


def test_a_model_without_a_chat_template(files: Any, tmp_path: Path) -> None:
    shutil.copytree(files.folder / "model", tmp_path / "model")
    for path in (tmp_path / "model").glob("*.jinja"):
        path.unlink()
    _fails(files, tmp_path / "run", ModelError, "no chat template", model=str(tmp_path / "model"))


def test_an_unknown_judge(files: Any, tmp_path: Path) -> None:
    _fails(files, tmp_path / "run", InputError, "paterns", "patterns", judge="paterns")


def test_no_preset_for_the_model(files: Any, tmp_path: Path) -> None:
    _fails(files, tmp_path / "run", InputError, "google/gemma-2-2b-it", saes=None, model="google/gemma-2-2b")


def test_a_model_that_is_not_there(files: Any, tmp_path: Path) -> None:
    message = _fails(files, tmp_path / "run", ModelError, "nowhere", model=str(tmp_path / "nowhere"))
    assert "config.json" in message


def test_a_folder_that_cannot_be_written(files: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    _fails(files, file / "run", RunError, "--out")


def test_too_few_prompts(files: Any, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("Steal a car\nRob a bank\n")
    _fails(files, tmp_path / "run", InputError, "few", "2 prompts", harmful=str(few))


def test_nothing_is_lost_by_an_error(files: Any, tmp_path: Path) -> None:
    """A run that fails late keeps what it had: put right, it goes on from there."""

    def fails(stage: str, _done: int, _total: int) -> None:
        if stage == "pool":
            raise SaeError("the disk with the SAEs went away")

    with pytest.raises(SaeError):
        files.study(tmp_path / "run", progress=fails, **files.small())
    stages: list[str] = []
    files.study(tmp_path / "run", progress=lambda stage, *_: stages.append(stage), **files.small())
    begun = {stage for stage in stages if stage != "loading"}
    assert "pool" in begun
    assert "direction" not in begun
    assert not [stage for stage in begun if stage.startswith(("clean: direction", "clean: selection", "clean: tuning"))]


def test_a_judge_of_harm_cannot_tell_outcomes(files: Any, tmp_path: Path) -> None:
    words = ("'harmbench'", "--judge patterns", "--harm-judges")
    _fails(files, tmp_path / "run", InputError, *words, judge="harmbench")
