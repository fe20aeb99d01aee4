"""Studies of MLP features: the planted model with its transcoders as files, and the studies that need the residual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planted_study import PlantedFiles, effect
from transcoder_files import write_transcoders

from demur.errors import InputError, SaeError
from demur.model import ChatModel


@pytest.fixture(scope="module", name="source")
def transcoders(files: PlantedFiles, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_transcoders(tmp_path_factory.mktemp("set"), files.truth.transcoders))


def test_a_study_finds_the_units_and_flips_refusal_with_them(files: PlantedFiles, source: str, tmp_path: Path) -> None:
    units = files.truth.units
    causal = {units[name] for name in (*(f"harm{n}" for n in range(8)), "refuse")}
    result = files.study(tmp_path, saes=source, k=len(causal), k0=48, methods=("cossim+ap",))
    assert {row.feature for row in result.features} == causal
    assert effect(result, "harmful", "suppress", "cossim+ap").compliance.value == 1.0
    assert "transcoders" in result.facts
    assert result.warnings == ()


@pytest.mark.parametrize("study", ["dictionaries", "probes"])
def test_a_study_of_the_residual_says_so_before_the_model_is_loaded(
    files: PlantedFiles, source: str, tmp_path: Path, study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(ChatModel, "load", never)
    with pytest.raises(InputError, match=f"`demur {study}` needs SAEs of the residual stream: .* holds transcoders"):
        files.study(tmp_path, study, saes=source)


def test_layouts_of_other_places_stop_a_study_at_once(files: PlantedFiles, tmp_path: Path) -> None:
    odd = write_transcoders(tmp_path / "odd", files.truth.transcoders, feature_input_hook="ln2.hook_normalized")
    with pytest.raises(SaeError, match="demur takes transcoders that read the MLP's input"):
        files.study(tmp_path / "out", saes=str(odd))
