"""Each reader gives the features and reconstructions that SAELens gives for the same file (float32)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_files import D_MODEL, D_SAE, gemma_scope, gemma_scope_2, llama_scope, random_weights, saelens
from safetensors.torch import load_file, save_file

from demur.errors import SaeError
from demur.saes import DenseSae, load_suite

pytestmark = pytest.mark.saelens

X = torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def lens() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
        import sae_lens.loading.pretrained_sae_loaders
    return sae_lens


@pytest.fixture
def local(lens: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """SAELens's downloads are served from this folder."""
    loaders = lens.loading.pretrained_sae_loaders

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:  # noqa: ARG001
        path = tmp_path / subfolder / filename
        if not path.is_file():
            raise loaders.EntryNotFoundError(str(path))
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:  # noqa: ARG001
        return {name: list(t.shape) for name, t in loaders.load_safetensors_weights(tmp_path / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    return tmp_path


def from_registry(lens: Any, monkeypatch: pytest.MonkeyPatch, repo: str, path: str, converter: str, **more: Any) -> Any:
    """Load through SAELens's own `from_pretrained`, with a registry of one release."""
    from sae_lens.loading import pretrained_saes_directory as directory

    entry = directory.PretrainedSAELookup(
        release="tiny",
        repo_id=repo,
        model="m",
        conversion_func=converter,
        saes_map={"one": path},
        expected_var_explained={"one": 1.0},
        expected_l0={"one": 12.0},
        neuronpedia_id={"one": ""},
        norm_scaling_factor=more.get("norm", {}),
        config_overrides=more.get("overrides"),
    )
    for module in (directory, lens.loading.pretrained_sae_loaders, lens.saes.sae):
        monkeypatch.setattr(module, "get_pretrained_saes_directory", lambda: {"tiny": entry})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lens.SAE.from_pretrained("tiny", "one", device="cpu", dtype="float32")


def agree(dense: DenseSae, theirs: Any) -> None:
    with torch.no_grad():
        features = theirs.encode(X)
        decoded = theirs.decode(features)
        assert (features > 0).any()
        assert (features == 0).any()
        assert torch.equal(dense.encode(X) > 0, features > 0)
        for ours, expected in ((dense.encode(X), features), (dense.decode(features), decoded)):
            assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gemma_scope(lens: Any, local: Path, monkeypatch: pytest.MonkeyPatch):
    path = gemma_scope(local, 5, 71, width="16k")
    overrides = {"d_in": D_MODEL, "d_sae": D_SAE}
    folder = str(path.parent.relative_to(local))
    theirs = from_registry(lens, monkeypatch, "google/gemma-scope-2b-pt-res", folder, "gemma_2", overrides=overrides)
    agree(load_suite(local)[5].dense(), theirs)


def test_gemma_scope_2(lens: Any, local: Path, monkeypatch: pytest.MonkeyPatch):
    folder = "resid_post_all/layer_4_width_16k_l0_big"
    gemma_scope_2(local, folder, config={"hf_hook_point_in": "model.layers.4.output", "l0": 80})
    theirs = from_registry(lens, monkeypatch, "google/gemma-scope-2-1b-it", folder, "gemma_3")
    agree(load_suite(local)[4].dense(), theirs)


def test_gemma_scope_2_transcoder(lens: Any, local: Path, monkeypatch: pytest.MonkeyPatch):
    folder = "transcoder_all/layer_4_width_16k_l0_big_affine"
    hooks = {name: f"model.layers.4.{name}_feedforward_layernorm.output" for name in ("pre", "post")}
    config = {"hf_hook_point_in": hooks["pre"], "hf_hook_point_out": hooks["post"], "l0": 80, "affine_connection": True}
    path = gemma_scope_2(local, folder, config=config) / "params.safetensors"
    skip = torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(5))
    save_file(load_file(path) | {"affine_skip_connection": skip}, path)
    theirs = from_registry(lens, monkeypatch, "google/gemma-scope-2-1b-it", folder, "gemma_3")
    ours = load_suite(local)[4].dense()
    assert (ours.reads, ours.writes) == ("mlp_in", "mlp_out")
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(X), theirs.encode(X))
        torch.testing.assert_close(ours.decode(ours.encode(X), X), theirs(X))


def test_llama_scope(lens: Any, local: Path, monkeypatch: pytest.MonkeyPatch):
    folder = llama_scope(local, 9, jump_relu_threshold=0.25)
    factor = D_MODEL**0.5 / 1.25
    theirs = from_registry(lens, monkeypatch, "r", folder.name, "llama_scope", norm={"one": factor})
    agree(load_suite(local)[9].dense(), theirs)


CONFIGS: dict[str, dict[str, Any]] = {
    "standard": {},
    "standard-centred": {"apply_b_dec_to_input": True},
    "jumprelu": {"architecture": "jumprelu"},
    "jumprelu-centred": {"architecture": "jumprelu", "apply_b_dec_to_input": True},
    "topk": {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": False},
    "topk-centred": {"architecture": "topk", "k": 3, "apply_b_dec_to_input": True},
    "topk-rescaled": {
        "architecture": "topk",
        "k": 3,
        "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": True,
    },
    "before-6-topk": {
        "metadata": None,
        "hook_point": "blocks.3.hook_resid_post",
        "architecture": None,
        "apply_b_dec_to_input": None,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
    },
    "before-6-standard": {
        "metadata": None,
        "hook_name": "blocks.3.hook_resid_post",
        "architecture": None,
        "apply_b_dec_to_input": None,
        "normalize_activations": None,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saelens_folder(lens: Any, tmp_path: Path, name: str, dtype: str):
    weights = {n: t.to(getattr(torch, dtype)) for n, t in random_weights(0).items()}
    if "jumprelu" not in name:
        del weights["threshold"]
    saelens(tmp_path, CONFIGS[name] | {"dtype": dtype}, **weights)
    agree(load_suite(tmp_path)[3].dense(), lens.SAE.load_from_disk(tmp_path, dtype="float32"))


def test_log_thresholds_of_a_jumprelu_checkpoint(lens: Any, tmp_path: Path):
    thresholds = random_weights(0)["threshold"]
    saelens(tmp_path / "theirs", {"architecture": "jumprelu"}, threshold=thresholds)
    saelens(tmp_path / "ours", {"architecture": "jumprelu"}, log_threshold=thresholds.log())
    agree(load_suite(tmp_path / "ours")[3].dense(), lens.SAE.load_from_disk(tmp_path / "theirs"))


def test_batchtopk_checkpoint_is_what_saelens_saves_for_inference(lens: Any, tmp_path: Path):
    config = {
        "architecture": "batchtopk",
        "k": 2.5,
        "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": True,
    }
    saelens(tmp_path / "a", config, topk_threshold=torch.tensor(0.5, dtype=torch.float64))
    training = lens.BatchTopKTrainingSAE.load_from_disk(tmp_path / "a")
    training.save_inference_model(tmp_path / "b")
    theirs = lens.SAE.load_from_disk(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "cfg.json").read_text())["architecture"] == "jumprelu"
    agree(load_suite(tmp_path / "a")[3].dense(), theirs)
    agree(load_suite(tmp_path / "b")[3].dense(), theirs)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_saelens_loads_what_demur_saves(lens: Any, tmp_path: Path, kind: str):
    raw = random_weights(2)
    ours = DenseSae(
        layer=3,
        w_enc=raw["W_enc"],
        b_enc=raw["b_enc"],
        threshold=raw["threshold"] if kind == "jumprelu" else None,
        k=4 if kind == "topk" else None,
        w_dec=raw["W_dec"],
        b_dec=raw["b_dec"],
    )
    ours.save_saelens(tmp_path, model_name="tiny")
    theirs = lens.SAE.load_from_disk(tmp_path)
    agree(ours, theirs)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "tiny"


def test_registry_source(lens: Any, local: Path, monkeypatch: pytest.MonkeyPatch):
    folder = llama_scope(local, 9, jump_relu_threshold=0.25)
    factor = D_MODEL**0.5 / 1.25
    theirs = from_registry(lens, monkeypatch, "r", folder.name, "llama_scope", norm={"one": factor})
    for source in ("saelens:tiny", "saelens:tiny/one"):
        suite = load_suite(source)
        assert suite.layers == (9,)
        assert suite.specs[0].average_l0 == 12.0
        suite.check(d_model=D_MODEL, n_layers=10)
        agree(suite[9].dense(), theirs)
    rows, dense = load_suite("saelens:tiny")[9].rows([3, 1]), load_suite(local)[9].dense()
    torch.testing.assert_close(rows.w_dec, dense.w_dec[[3, 1]])
    with pytest.raises(SaeError, match="no release 'tinny'; the nearest are tiny"):
        load_suite("saelens:tinny")
    with pytest.raises(SaeError, match="no SAE 'two'; the nearest are one"):
        load_suite("saelens:tiny/two")
    with pytest.raises(SaeError, match="newest revision only"):
        load_suite("saelens:tiny", revision="main")


def test_registry_without_the_norm_factor_is_refused(lens: Any, local: Path, monkeypatch: pytest.MonkeyPatch):
    folder = llama_scope(local, 9)
    from_registry(lens, monkeypatch, "r", folder.name, "llama_scope")
    with pytest.raises(SaeError, match="its factor is neither there"):
        load_suite("saelens:tiny")[9].rows([0])


@pytest.mark.slow
def test_registry_of_the_presets(lens: Any):  # noqa: ARG001
    """The presets' repositories are those that SAELens lists, with every layer at the preset's width."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    from demur.saes import PRESETS, width_number

    releases = list(get_pretrained_saes_directory().values())
    layers = {"google/gemma-2-2b-it": 26, "google/gemma-2-9b-it": 42, "meta-llama/Llama-3.1-8B-Instruct": 32}
    layers |= {"google/gemma-3-1b-it": 26, "google/gemma-3-4b-it": 34, "google/gemma-3-12b-it": 48}
    for preset in PRESETS.values():
        here = [release for release in releases if release.repo_id == preset.saes]
        listed = {path for release in here for path in release.saes_map.values()}
        assert width_number(preset.width or "") is not None
        for layer in range(layers[preset.model]):
            names = (
                f"layer_{layer}/width_{preset.width}/",
                f"layer_{layer}_width_{preset.width}_",
                f"-L{layer}R-8x",
            )
            assert any(name in path for path in listed for name in names), (preset.model, layer)
