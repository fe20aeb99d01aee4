"""What is listed of others' SAEs, with and without SAELens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import run
from demur.errors import InputError
from demur.saes import PRESETS
from demur.saes.listing import list_presets, list_releases, model_family

REGISTRY = """
chat-res:
  model: owner/tiny-2b-it
  repo_id: a/b
  saes:
  - {id: layer_3/width_16k/average_l0_20, path: p, l0: 20}
  - {id: layer_4/width_65k/average_l0_90, path: p, l0: 90}
base-mixed:
  model: tiny-2b
  repo_id: a/c
  saes:
  - {id: blocks.0.hook_resid_pre, path: p}
  - {id: blocks.5.hook_resid_pre, path: p}
  - {id: blocks.5.hook_mlp_out, path: p}
  - {id: blocks.5.attn.hook_z, path: p}
base-transcoders:
  model: tiny-2b
  repo_id: a/d
  saes:
  - {id: layer_0, path: transcoder_all/layer_0}
base-normed:
  model: tiny-2b
  repo_id: a/e
  config_overrides: {normalize_activations: constant_norm_rescale}
  saes:
  - {id: blocks.7.hook_resid_post, path: p}
other-res-width-2pow12:
  model: other/Big-7B-Base
  repo_id: a/f
  saes:
  - {id: resid_post_layer_9_trainer_1, path: p}
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of SAELens with these releases."""
    (tmp_path / "pretrained_saes.yaml").write_text(REGISTRY, encoding="utf-8")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("demur.saes.listing.find_spec", lambda _: spec)


def without_saelens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demur.saes.listing.find_spec", lambda _: None)


@pytest.mark.usefixtures("registry")
def test_releases_of_a_models_family_chat_trained_and_readable_first() -> None:
    found = list_releases("google/Tiny-2B-it") or []
    rows = [(r.name, r.site, r.chat_trained, r.layers, r.widths, r.l0, r.unreadable) for r in found]
    assert rows == [
        ("chat-res", "residual", True, (3, 4), ("16k", "65k"), (20.0, 90.0), None),
        ("base-mixed", "residual", False, (4,), (), (), None),
        ("base-mixed", "embedding", False, (-1,), (), (), "embedding SAEs"),
        ("base-mixed", "MLP", False, (5,), (), (), "MLP SAEs"),
        ("base-mixed", "attention", False, (5,), (), (), "attention SAEs"),
        ("base-transcoders", "transcoder", False, (0,), (), (), "transcoders"),
        ("base-normed", "residual", False, (7,), (), (), "SAEs that normalise each token"),
    ]
    other = (list_releases("big-7b-instruct") or [])[0]
    assert (other.name, other.layers, other.widths) == ("other-res-width-2pow12", (9,), ("4k",))


@pytest.mark.usefixtures("registry")
def test_command_prints_what_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ran = run("saes", "list", "--model", "owner/tiny-2b-it")
    assert ran.code == 0
    assert "5 more are of other activations or forms; --all lists them." in ran.words
    assert "demur study owner/tiny-2b-it --saes saelens:chat-res --sae-width 16k --harmful" in ran.words
    every = run("saes", "list", "--model", "tiny-2b", "--all")
    assert "no: transcoders" in every.words
    wrong = run("saes", "list", "--model", "nobody/tiny-2c")
    assert wrong.code == 2
    assert "nobody's SAEs for 'nobody/tiny-2c' are known here (nearest: 'tiny-2b')" in wrong.error
    assert "`demur saes train`" in wrong.error


def test_presets_are_listed_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without_saelens(monkeypatch)
    ran = run("saes", "list")
    assert ran.code == 0
    assert all(name in ran.words for name in PRESETS)
    assert "pip install 'demur[saelens]'" in ran.error
    chat = [preset.chat_trained for preset in list_presets()]
    assert chat == sorted(chat, reverse=True)
    llama = run("saes", "list", "--model", "meta-llama/Llama-3.1-8B-Instruct")
    assert "--saes llama-3.1-8b-instruct-andyrdt --harmful" in llama.words


@pytest.mark.parametrize(
    ("model", "family"),
    [("google/gemma-2-2b-it", "gemma-2-2b"), ("Qwen/Qwen3-8B-Base", "qwen3-8b"), ("gpt2-small", "gpt2-small"),
     ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"), ("google/gemma-3-1b-pt", "gemma-3-1b")],
)  # fmt: skip
def test_family_is_the_name_without_owner_and_tuning(model: str, family: str) -> None:
    assert model_family(model) == family


@pytest.mark.saelens
def test_the_real_registry_has_the_chat_trained_releases_that_presets_name() -> None:
    found: dict[str, Any] = {release.source: release for release in list_releases() or [] if not release.unreadable}
    for preset in PRESETS.values():
        if preset.saes.startswith("saelens:"):
            assert found[preset.saes].chat_trained
            assert model_family(found[preset.saes].model) == model_family(preset.model)
    scope = found["saelens:gemma-scope-2b-pt-res"]
    assert (scope.layers, scope.chat_trained) == (tuple(range(26)), False)
    assert {"16k", "65k", "1m"} <= set(scope.widths)
    assert found["saelens:gemma-scope-9b-it-res"].chat_trained
    with pytest.raises(InputError):
        list_releases("nobody/nothing")
