from __future__ import annotations

from pathlib import Path

import pytest

from demur.errors import InputError
from demur.saes import PRESETS, find_preset, get_preset
from demur.studies.config import CompareConfig


def test_papers_settings():
    gemma, llama = PRESETS["google/gemma-2-2b-it"], PRESETS["meta-llama/Llama-3.1-8B-Instruct"]
    assert (gemma.saes, gemma.width, gemma.average_l0) == ("google/gemma-scope-2b-pt-res", "65k", 100.0)
    assert [preset.model for preset in PRESETS.values() if preset.paper] == [gemma.model, llama.model]


@pytest.mark.parametrize(
    ("name", "layer", "c", "v"),
    [
        ("google/gemma-2-2b-it", 15, -3.0, (10.0, 15.0, 20.0, 25.0, 30.0)),
        ("meta-llama/Llama-3.1-8B-Instruct", 11, -1.0, (1.0, 2.0, 3.0, 4.0, 5.0)),
    ],
)
def test_papers_settings_fit_the_configuration_of_a_study(name: str, layer: int, c: float, v: tuple[float, ...]):
    settings = PRESETS[name].study_settings()
    assert settings == {
        "direction_layer": layer,
        "k0": 10,
        "k": 20,
        "steps": 10,
        "estimator": "paper",
        "suppress": (c,),
        "induce": v,
        "induce_where": "all",
    }
    asked = {"model": name, "harmful": ("x",), "harmless": ("x",)}
    config = CompareConfig.model_validate(asked | settings)
    assert {field: getattr(config, field) for field in settings} == settings


def test_a_model_that_the_paper_did_not_study_has_no_settings_of_the_paper():
    with pytest.raises(
        InputError,
        match=r"no settings for google/gemma-2-9b-it; it studied google/gemma-2-2b-it, "
        r"meta-llama/Llama-3\.1-8B-Instruct\. Leave out --paper-settings",
    ):
        PRESETS["google/gemma-2-9b-it"].study_settings()


def test_a_model_named_in_place_of_saes_stands_for_its_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_preset("google/gemma-2-2b-it") is find_preset("Gemma-2-2B-it") is PRESETS["google/gemma-2-2b-it"]
    assert find_preset("google/gemma-scope-2b-pt-res") is None
    (tmp_path / "gemma-2-2b-it").mkdir()
    assert find_preset("gemma-2-2b-it") is None


def test_a_second_suite_of_a_model_goes_by_its_own_name():
    for name in ("goodfire-llama-3.1-8b-instruct", "llama-3.1-8b-instruct-andyrdt"):
        preset = find_preset(name)
        assert preset is not None
        assert (preset.model, preset.chat_trained) == ("meta-llama/Llama-3.1-8B-Instruct", True)
        assert preset.saes == f"saelens:{name}"
    # The model itself keeps the suite that the paper used.
    assert get_preset("meta-llama/Llama-3.1-8B-Instruct").paper


def test_every_preset_is_a_hub_pair():
    assert len(PRESETS) >= 5
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert preset.model.count("/") == 1
        assert preset.saes.startswith("saelens:") or preset.saes.count("/") == 1
        assert type(preset).model_validate_json(preset.model_dump_json()) == preset


def test_names_are_found_without_owner_or_case():
    assert get_preset("Gemma-2-9B-it").model == "google/gemma-2-9b-it"
    assert get_preset("google/gemma-2-9b-it").model == "google/gemma-2-9b-it"


def test_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match=r"no preset for 'google/gemma-2-2b'; the nearest is google/gemma-2-2b-it"):
        get_preset("google/gemma-2-2b")
