"""Finding SAEs in folders and on the hub: layouts, choices, and what is refused."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from sae_files import D_MODEL, D_SAE, gemma_scope, gemma_scope_2, llama_scope, random_weights, saelens

from demur.errors import InputError, SaeError
from demur.model import ChatModel
from demur.saes import DenseSae, FeatureRows, HookError, Suite, TopKRows, load_saes, load_suite
from demur.saes.layouts import LAYOUTS, Convention, FoundSae, Layout, SaeFiles
from demur.testing import tiny_model, tiny_suite


def paths(suite: Suite) -> list[str]:
    return [spec.source.split("/")[-2] for spec in suite.specs]


# Gemma Scope


def test_gemma_scope_takes_the_nearest_l0_and_the_sparser_of_two(tmp_path: Path):
    for layer, l0s in {0: (20, 90, 140), 2: (80, 120), 1: (300,)}.items():
        for l0 in l0s:
            gemma_scope(tmp_path, layer, l0)
    suite = load_suite(tmp_path)
    assert suite.layers == (0, 1, 2)
    assert paths(suite) == ["average_l0_90", "average_l0_300", "average_l0_80"]
    assert [spec.average_l0 for spec in suite.specs] == [90, 300, 80]
    assert paths(load_suite(tmp_path, average_l0=30)) == ["average_l0_20", "average_l0_300", "average_l0_80"]
    assert load_suite(tmp_path, layers=[2]).layers == (2,)


def test_gemma_scope_reads_the_numbers(tmp_path: Path):
    gemma_scope(tmp_path, 0, 50, seed=3)
    raw, dense = random_weights(3), load_suite(tmp_path)[0].dense()
    assert torch.equal(dense.w_enc, raw["W_enc"])
    assert torch.equal(dense.w_dec, raw["W_dec"])
    assert torch.equal(dense.b_enc, raw["b_enc"])
    assert torch.equal(dense.b_dec, raw["b_dec"])
    assert dense.threshold is not None
    assert torch.equal(dense.threshold, raw["threshold"])


@pytest.mark.parametrize(("dtype", "exact"), [("f2", 1e-3), ("f8", 0.0), (">f4", 0.0)])
def test_gemma_scope_in_other_dtypes_and_cases(tmp_path: Path, dtype: str, exact: float):
    gemma_scope(tmp_path, 0, 50, dtype=dtype, lower=dtype == "f8")
    dense = load_suite(tmp_path)[0].dense()
    assert dense.w_dec.dtype == torch.float32
    torch.testing.assert_close(dense.w_dec, random_weights(0)["W_dec"], rtol=exact, atol=0)


def test_several_widths_need_a_choice(tmp_path: Path):
    gemma_scope(tmp_path, 0, 50, width="16k")
    gemma_scope(tmp_path, 0, 50, width="65k")
    gemma_scope(tmp_path, 1, 50, width="16k")
    with pytest.raises(SaeError, match=r"several widths at layer 0.*widths there: 16k, 65k"):
        load_suite(tmp_path)
    with pytest.raises(SaeError, match=r"no width 65k at layer 1; widths there: 16k"):
        load_suite(tmp_path, layers=[0, 1], width="65k")
    with pytest.raises(SaeError, match=r"no SAEs of width 131k; widths there: 16k, 65k"):
        load_suite(tmp_path, width="131k")
    with pytest.raises(SaeError, match="width 'wide' is not a number of features"):
        load_suite(tmp_path, width="wide")
    assert load_suite(tmp_path, width=65_536).layers == (0,)


def test_missing_layer_names_those_there(tmp_path: Path):
    for layer in (0, 1, 2, 7):
        gemma_scope(tmp_path, layer, 50)
    with pytest.raises(SaeError, match=r"no SAE for layer 9; it has layers 0–2, 7 \(nearest: 7\)"):
        load_suite(tmp_path, layers=[1, 9])


def test_wrong_shapes_are_named(tmp_path: Path):
    path = gemma_scope(tmp_path, 0, 50)
    arrays = {name: tensor.numpy() for name, tensor in random_weights(0).items()}
    np.savez(path, allow_pickle=False, **(arrays | {"b_enc": np.zeros(3)}))
    with pytest.raises(SaeError, match=r"b_enc has shape \[3\]; it must be \[16\] beside W_enc of shape \[6, 16\]"):
        load_suite(tmp_path)
    np.savez(path, allow_pickle=False, **(arrays | {"W_dec": arrays["W_enc"]}))
    with pytest.raises(SaeError, match=r"W_dec has shape \[6, 16\]; it must be \[16, 6\]"):
        load_suite(tmp_path)


@pytest.mark.parametrize(
    ("name", "place", "feature"),
    [
        ("W_enc", (2, 5), "; feature 5"),
        ("W_dec", (5, 2), "; feature 5"),
        ("b_enc", (3,), "; feature 3"),
        ("b_dec", (3,), ""),
        ("threshold", (9,), "; feature 9"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_named_at_load(
    tmp_path: Path, name: str, place: tuple[int, ...], feature: str, value: float
):
    path = gemma_scope(tmp_path, 0, 50)
    arrays = {key: tensor.numpy() for key, tensor in random_weights(0).items()}
    arrays[name][place] = value
    np.savez(path, allow_pickle=False, **arrays)
    with pytest.raises(SaeError, match=re.escape(f"params.npz: {name}{list(place)} is {value}{feature}.")):
        load_suite(tmp_path)


def test_weights_of_a_large_sae_are_checked_when_read():
    # Above 64 MiB only biases and thresholds are read at load. 8 * 16 * 600,000 bytes are 73 MiB.
    wide = dense(0, d_model=16, d_sae=600_000)
    wide.w_enc[2, 5] = torch.nan
    suite = Suite.from_dense({4: wide})
    suite.check_files()
    assert suite[4].rows([4, 6]).w_enc.shape == (16, 2)
    for read in (lambda: suite[4].rows([5]), suite[4].dense, lambda: list(suite[4].encoder_blocks(4096))):
        with pytest.raises(SaeError, match=r"W_enc\[2, 5\] is nan; feature 5"):
            read()
    wide.b_enc[7] = torch.inf
    with pytest.raises(SaeError, match=r"b_enc\[7\] is inf; feature 7"):
        suite.check_files()


@pytest.mark.parametrize("layout", [gemma_scope, llama_scope])
def test_truncated_file_is_found_at_load(tmp_path: Path, layout: Any):
    layout(tmp_path, 0, *([50] if layout is gemma_scope else []))
    (path,) = (*tmp_path.rglob("*.npz"), *tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SaeError, match=rf"{path.name} (cannot be read as an npz file|is truncated)"):
        load_suite(tmp_path)


@pytest.mark.parametrize("layers", [[0, 0], [1, 0, 1]])
def test_layer_given_twice_is_refused(tmp_path: Path, layers: list[int]):
    for layer in (0, 1):
        gemma_scope(tmp_path, layer, 50)
    with pytest.raises(InputError, match=rf"layer {layers[0]} is given twice"):
        load_suite(tmp_path, layers=layers)
    assert load_suite(tmp_path, layers=[1, 0]).layers == (0, 1)


# Gemma Scope 2


def test_gemma_scope_2_uses_the_l0_of_the_configuration(tmp_path: Path):
    hook = {"hf_hook_point_in": "model.layers.4.output"}
    gemma_scope_2(tmp_path, "resid_post_all/layer_4_width_16_l0_small", config=hook | {"l0": 15})
    gemma_scope_2(tmp_path, "resid_post_all/layer_4_width_16_l0_big", config=hook | {"l0": 118}, seed=1)
    gemma_scope_2(tmp_path, "resid_post/layer_4_width_16_l0_medium", config=hook | {"l0": 55})
    gemma_scope_2(tmp_path, "mlp_out_all/layer_4_width_16_l0_big", config=hook)
    suite = load_suite(tmp_path)
    assert paths(suite) == ["layer_4_width_16_l0_big"]
    assert suite.specs[0].average_l0 == 118
    assert torch.equal(suite[4].dense().w_dec, random_weights(1)["W_dec"])
    assert paths(load_suite(tmp_path, average_l0=30)) == ["layer_4_width_16_l0_small"]
    assert paths(load_suite(tmp_path / "resid_post")) == ["layer_4_width_16_l0_medium"]


def test_gemma_scope_2_without_configuration_goes_by_the_name(tmp_path: Path):
    for size in ("small", "medium", "big"):
        gemma_scope_2(tmp_path, f"resid_post/layer_0_width_16_l0_{size}")
    assert paths(load_suite(tmp_path, average_l0=70)) == ["layer_0_width_16_l0_medium"]
    assert paths(load_suite(tmp_path, average_l0=1000)) == ["layer_0_width_16_l0_big"]


def test_gemma_scope_2_of_other_sites_is_refused(tmp_path: Path):
    gemma_scope_2(tmp_path, "mlp_out_all/layer_0_width_16_l0_big")
    with pytest.raises(HookError, match="mlp_out_all; demur takes the SAEs under resid_post"):
        load_suite(tmp_path)


def test_gemma_scope_2_hook_must_agree_with_the_name(tmp_path: Path):
    gemma_scope_2(tmp_path, "resid_post/layer_0_width_16_l0_big", config={"hf_hook_point_in": "model.layers.1.output"})
    with pytest.raises(SaeError, match=r"hf_hook_point_in is 'model\.layers\.1\.output', but the folder is of layer 0"):
        load_suite(tmp_path)


# Llama Scope


def test_llama_scope_folds_the_norm_by_hand(tmp_path: Path):
    # d_model 6 and a mean norm of sqrt(6)/2: inputs are doubled, outputs halved, thresholds doubled.
    llama_scope(tmp_path, 5, dataset_average_activation_norm={"in": 6**0.5 / 2})
    raw, sae = random_weights(0), load_suite(tmp_path)[5]
    dense = sae.dense()
    torch.testing.assert_close(dense.w_enc, raw["W_enc"] * 2)
    torch.testing.assert_close(dense.w_dec, raw["W_dec"] / 2)
    torch.testing.assert_close(dense.b_dec, raw["b_dec"] / 2)
    assert torch.equal(dense.b_enc, raw["b_enc"])
    assert dense.threshold is not None
    torch.testing.assert_close(dense.threshold, torch.full((D_SAE,), 1.5))
    assert (sae.spec.d_model, sae.spec.d_sae, sae.spec.activation) == (D_MODEL, D_SAE, "jumprelu")


def test_llama_scope_subtracts_its_decoder_bias_only_where_told_to(tmp_path: Path):
    # As the file means it: f = relu(2x · W + b) above 2 · threshold; with the flag, f = relu((2x − b_dec) · W + b).
    raw, x = random_weights(0), torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0])
    half = {"in": 6**0.5 / 2}
    for told, shift in ((None, 0.0), (False, 0.0), (True, 1.0)):
        llama_scope(
            tmp_path / str(told), 5, dataset_average_activation_norm=half, apply_decoder_bias_to_pre_encoder=told
        )
        pre = (2 * x - shift * raw["b_dec"]) @ raw["W_enc"] + raw["b_enc"]
        f = torch.where(pre > 2 * 0.75, pre, 0.0)
        found = load_suite(tmp_path / str(told))[5].dense()
        torch.testing.assert_close(found.encode(x), f)
        torch.testing.assert_close(found.decode(f), (f @ raw["W_dec"] + raw["b_dec"]) / 2)


@pytest.mark.parametrize("norms", [{}, {"out": 1.0}, None, {"in": 0}, {"in": "1"}, {"in": float("inf")}])
def test_llama_scope_without_its_norm_is_refused(tmp_path: Path, norms: Any):
    llama_scope(tmp_path, 5, dataset_average_activation_norm=norms)
    with pytest.raises(SaeError, match=r"hyperparams\.json: dataset_average_activation_norm\.in is"):
        load_suite(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_point_in": "blocks.5.hook_mlp_out"}, r"trained on 'blocks\.5\.hook_mlp_out'"),
        ({"hook_point_out": "blocks.5.hook_mlp_out"}, "transcoder to blocks.5.hook_mlp_out"),
        ({"act_fn": "topk"}, "act_fn is 'topk'"),
        ({"d_sae": 1.5}, "d_sae is 1.5; expected a whole number"),
        ({"hook_point_in": 3}, "hook_point_in is 3; expected a string"),
        ({"hook_point_in": None}, "hook_point_in is missing"),
    ],
)
def test_llama_scope_refusals(tmp_path: Path, changes: dict[str, Any], message: str):
    llama_scope(tmp_path, 5, **changes)
    with pytest.raises(SaeError, match=message):
        load_suite(tmp_path)


def test_width_that_the_file_belies_is_named(tmp_path: Path):
    llama_scope(tmp_path, 5, d_sae=32)
    with pytest.raises(SaeError, match="holds an SAE of 16 features over d_model 6; its name or configuration says 32"):
        load_suite(tmp_path)


def test_identity_depends_on_what_is_folded(tmp_path: Path):
    llama_scope(tmp_path / "a", 5)
    llama_scope(tmp_path / "b", 5)
    llama_scope(tmp_path / "c", 5, jump_relu_threshold=0.5)
    llama_scope(tmp_path / "d", 5, seed=1)
    identities = [load_suite(tmp_path / name).identity for name in "abcd"]
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3


def test_identity_of_a_large_file_depends_on_all_its_parts(tmp_path: Path):
    shapes = {"w_enc": [64, 140_000], "w_dec": [140_000, 64], "b_enc": [140_000], "b_dec": [64], "threshold": [140_000]}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder = tmp_path / "resid_post" / "layer_0_width_140000_l0_big"
    folder.mkdir(parents=True)
    with (folder / "params.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    identities = {load_suite(tmp_path).identity}
    for place in (0.1, 0.5, 0.9):  # a megabyte is wider than the gaps between what is hashed of so large a file
        with (folder / "params.safetensors").open("r+b") as file:
            file.seek(int(place * end))
            file.write(np.ones(1 << 18, dtype=np.float32).tobytes())
        identities.add(load_suite(tmp_path).identity)
    assert len(identities) == 4


# SAELens folders


@pytest.mark.parametrize("said", [True, None])
def test_saelens_centring_by_hand_is_the_default(tmp_path: Path, said: bool | None):
    saelens(tmp_path, {"apply_b_dec_to_input": said})
    raw, dense = random_weights(0), load_suite(tmp_path)[3].dense()
    torch.testing.assert_close(dense.b_enc, raw["b_enc"] - raw["b_dec"] @ raw["W_enc"])
    assert torch.equal(dense.w_enc, raw["W_enc"])
    assert torch.equal(dense.b_dec, raw["b_dec"])
    assert dense.threshold is None


def test_many_saelens_folders_make_a_suite(tmp_path: Path):
    saelens(tmp_path / "a", {"metadata": {"hook_name": "blocks.7.hook_resid_post"}})
    saelens(
        tmp_path / "b" / "c",
        {"metadata": {"hook_name": "blocks.3.hook_resid_pre"}, "architecture": "topk", "k": 2},
    )
    saelens(tmp_path / "d", {"metadata": {"hook_name": "blocks.3.attn.hook_z"}})
    suite = load_suite(tmp_path)
    assert suite.layers == (2, 7)
    assert [spec.hook for spec in suite.specs] == ["blocks.3.hook_resid_pre", "blocks.7.hook_resid_post"]
    assert isinstance(suite[2].rows([1]), TopKRows)
    assert isinstance(suite[7].rows([1]), FeatureRows)
    assert (suite.specs[0].activation, suite.specs[0].k) == ("topk", 2)


@pytest.mark.parametrize(
    "hook",
    ["blocks.3.hook_mlp_out", "blocks.0.hook_resid_pre", "blocks.3.hook_resid_mid", "model.layers.3.mlp"],
)
def test_other_hooks_are_refused(tmp_path: Path, hook: str):
    saelens(tmp_path, {"metadata": {"hook_name": hook}})
    with pytest.raises(HookError, match="demur needs SAEs of the residual stream"):
        load_suite(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "gated"}, "architecture 'gated' has no canonical form"),
        ({"architecture": "topk", "k": None}, "needs a whole number k, not None"),
        ({"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu' has no canonical form"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is hook_z"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm', which rescales each token"),
        (
            {"normalize_activations": "constant_norm_rescale"},
            "'constant_norm_rescale', which rescales each token",
        ),
        ({"normalize_activations": "expected_average_only_in"}, "its factor is neither there"),
        ({"d_in": None}, "d_in is missing"),
        ({"metadata": {}}, "hook_name is missing"),
    ],
)
def test_saelens_refusals(tmp_path: Path, config: dict[str, Any], message: str):
    saelens(tmp_path, config)
    with pytest.raises(SaeError, match=message):
        load_suite(tmp_path)


@pytest.mark.parametrize("place", ["config", "checkpoint"])
def test_expected_average_is_folded_when_its_factor_is_there(tmp_path: Path, place: str):
    config = {"normalize_activations": "expected_average_only_in", "apply_b_dec_to_input": True}
    saelens(tmp_path, config | ({"norm_scaling_factor": 4.0} if place == "config" else {}))
    if place == "checkpoint":
        (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 4.0}))
    raw, dense = random_weights(0), load_suite(tmp_path)[3].dense()
    assert torch.equal(dense.w_enc, raw["W_enc"] * 4)
    assert torch.equal(dense.b_dec, raw["b_dec"] / 4)
    torch.testing.assert_close(dense.b_enc, raw["b_enc"] - raw["b_dec"] @ raw["W_enc"])


def test_finetuning_factor_is_refused_unless_ones(tmp_path: Path):
    saelens(tmp_path / "a", {}, scaling_factor=torch.ones(D_SAE))
    assert load_suite(tmp_path / "a")[3].dense().w_dec.shape == (D_SAE, D_MODEL)
    saelens(tmp_path / "b", {}, scaling_factor=torch.full((D_SAE,), 2.0))
    with pytest.raises(SaeError, match="finetuning scaling_factor"):
        load_suite(tmp_path / "b")


def test_log_thresholds_by_hand(tmp_path: Path):
    saelens(tmp_path, {"architecture": "jumprelu"}, threshold=None, log_threshold=torch.full((D_SAE,), math.log(2.0)))
    sae = load_suite(tmp_path)[3]
    thresholds = sae.rows([7, 0]).threshold
    assert thresholds is not None
    torch.testing.assert_close(thresholds, torch.tensor([2.0, 2.0]))
    saelens(tmp_path, {"architecture": "jumprelu"}, threshold=None, log_threshold=torch.full((D_SAE,), 100.0))
    with pytest.raises(SaeError, match="log_threshold is above 88"):
        load_suite(tmp_path)


def test_batchtopk_checkpoint_is_a_jumprelu_with_its_threshold(tmp_path: Path):
    threshold = torch.tensor(0.5, dtype=torch.float64)
    saelens(tmp_path, {"architecture": "batchtopk", "k": 2.5}, topk_threshold=threshold)
    raw, sae = random_weights(0), load_suite(tmp_path)[3]
    norms = raw["W_dec"].norm(dim=1)
    dense = sae.dense()
    assert isinstance(sae.rows([0]), FeatureRows)
    assert dense.threshold is not None
    assert torch.equal(dense.threshold, torch.full((D_SAE,), 0.5))
    torch.testing.assert_close(dense.w_enc, raw["W_enc"] * norms)
    torch.testing.assert_close(dense.w_dec, raw["W_dec"] / norms[:, None])


def test_batchtopk_without_threshold_is_refused(tmp_path: Path):
    saelens(tmp_path, {"architecture": "batchtopk", "k": 2.5})
    with pytest.raises(SaeError, match=r"has none of .*topk_threshold.* depends on the rest of the batch"):
        load_suite(tmp_path)


def test_two_saes_of_one_layer_are_ambiguous(tmp_path: Path):
    saelens(tmp_path / "a", {})
    saelens(tmp_path / "b", {})
    with pytest.raises(SaeError, match=r"2 SAEs for layer 3 and no average L0 .*a/sae_weights.*b/sae_weights"):
        load_suite(tmp_path)


def test_malformed_configuration(tmp_path: Path):
    saelens(tmp_path, {})
    for text in ("{", "[]", "\x00"):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(SaeError, match=r"cfg\.json (cannot be read as JSON|is not a JSON object)"):
            load_suite(tmp_path)


# writers


def dense(seed: int, *, kind: str = "jumprelu", layer: int = 4, d_model: int = D_MODEL, d_sae: int = 1024) -> DenseSae:
    raw = random_weights(seed, d_model, d_sae)
    return DenseSae(
        layer=layer,
        w_enc=raw["W_enc"],
        b_enc=raw["b_enc"],
        threshold=raw["threshold"] if kind == "jumprelu" else None,
        k=5 if kind == "topk" else None,
        w_dec=raw["W_dec"],
        b_dec=raw["b_dec"],
    )


def same(one: DenseSae, other: DenseSae) -> bool:
    return one.digest() == other.digest()


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_saelens_round_trip(tmp_path: Path, kind: str):
    sae = dense(0, kind=kind)
    assert sae.save_saelens(tmp_path / "layer_4") == tmp_path / "layer_4"
    assert same(load_suite(tmp_path)[4].dense(), sae)


def test_gemma_scope_round_trip_to_the_byte(tmp_path: Path):
    sae = dense(0)
    path = sae.save_gemma_scope(tmp_path / "a", average_l0=30.6)
    assert path == tmp_path / "a" / "layer_4" / "width_1k" / "average_l0_31" / "params.npz"
    suite = load_suite(tmp_path / "a", width="1k")
    assert same(suite[4].dense(), sae)
    again = suite[4].dense().save_gemma_scope(tmp_path / "b", average_l0=31)
    assert again.read_bytes() == path.read_bytes()
    assert load_suite(tmp_path / "b").identity == suite.identity


def test_gemma_scope_writes_relu_as_jumprelu_and_refuses_topk(tmp_path: Path):
    sae = dense(0, kind="relu")
    sae.save_gemma_scope(tmp_path, average_l0=30)
    x = torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_suite(tmp_path)[4].dense().encode(x), sae.encode(x))
    with pytest.raises(SaeError, match="save_saelens"):
        dense(0, kind="topk").save_gemma_scope(tmp_path, average_l0=30)


# sources


def test_folder_without_saes_lists_the_layouts(tmp_path: Path):
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(
        SaeError, match=r"no SAEs in a known layout; known are: Gemma Scope .*SAELens .*saelens:RELEASE"
    ):
        load_suite(tmp_path)


def test_sources_that_cannot_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for source in (tmp_path / "file", tmp_path / "absent", "absent", "a//c"):
        with pytest.raises(SaeError, match="is not a folder of SAEs"):
            load_suite(source)
    with pytest.raises(SaeError, match="only makes sense for a hub repository"):
        load_suite(tmp_path, revision="main")


def test_without_saelens_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(SaeError, match=r"pip install 'demur\[saelens\]'"):
        load_suite("saelens:anything")


def test_toy_layout_in_one_place(tmp_path: Path):
    def describe(files: SaeFiles, match: re.Match[str]) -> FoundSae:
        return FoundSae(files, match[0], layer=int(match[1]), convention=Convention("relu"))

    LAYOUTS.register("toy", Layout("Toy (toy_L.npz)", r"toy_(\d+)\.npz", describe))
    raw = random_weights(0)
    for layer in (4, 2):
        np.savez(tmp_path / f"toy_{layer}.npz", allow_pickle=False, **{name: t.numpy() for name, t in raw.items()})
    suite = load_suite(tmp_path)
    assert suite.layers == (2, 4)
    assert suite.specs[0].source == f"{tmp_path}/toy_2.npz"
    x = torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(suite[2].dense().encode(x), torch.relu(x @ raw["W_enc"] + raw["b_enc"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SaeError, match=r"known are: .*Toy \(toy_L\.npz\)"):
        load_suite(tmp_path / "empty")


def test_load_saes_checks_that_they_fit_the_model(tmp_path: Path):
    tiny = ChatModel(*tiny_model("gemma2", n_layers=3, d_model=8), name="tiny")
    for layer in (1, 2):
        gemma_scope(tmp_path / "a", layer, 50)
    with pytest.raises(SaeError, match="width 6, but the model's are 8"):
        load_saes(tiny, tmp_path / "a")
    for layer, sae in enumerate(tiny_suite(tiny.hf).values()):
        sae.dense().save_gemma_scope(tmp_path / "b", average_l0=30 + layer)
    assert load_saes(tiny, tmp_path / "b", layers=[2, 0]).layers == (0, 2)
    with pytest.raises(InputError, match="no preset for 'tiny'"):
        load_saes(tiny)


@pytest.mark.parametrize("asked", [("google/gemma-2-2b-it",), ("./fine-tune", "gemma-2-2b-it")])
def test_load_saes_takes_source_and_width_from_the_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...]
):
    for width in ("16k", "65k"):
        gemma_scope(tmp_path, 3, 90, width=width)
    hub = Hub(tmp_path, monkeypatch)
    (spec,) = load_saes(*asked).specs
    assert (hub.repo, spec.d_sae) == ("google/gemma-scope-2b-pt-res", 65536)
    assert load_saes(*asked, width="16k").specs[0].d_sae == 16384


class Hub:
    """Stands for the hub: a folder is the repository `owner/name`, downloads are recorded."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.revision = "main"
        self.downloads: list[str] = []
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self._info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self._download)

    def _info(self, repo: str, *, revision: str | None, timeout: float) -> Any:
        assert timeout <= 10
        self.repo = repo
        self.revision = revision or "main"
        files = [SimpleNamespace(rfilename=p.relative_to(self.folder).as_posix()) for p in self.folder.rglob("*.*")]
        return SimpleNamespace(sha="c0ffee" * 6 + "abcd", siblings=files)

    def _download(self, repo: str, file: str, *, revision: str, local_files_only: bool) -> str:
        assert not local_files_only
        assert (repo, revision) == (self.repo, "c0ffee" * 6 + "abcd")
        self.downloads.append(file)
        return str(self.folder / file)


def test_hub_downloads_only_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for layer in (0, 1, 2):
        gemma_scope(tmp_path, layer, 90, width="16k")
        gemma_scope(tmp_path, layer, 20, width="16k")
    hub = Hub(tmp_path, monkeypatch)
    suite = load_suite("google/gemma-scope-2b-pt-res", revision="v1")
    assert hub.revision == "v1"
    suite.check(d_model=2304, n_layers=26)
    with pytest.raises(SaeError, match="width 2304, but the model's are 3584"):
        suite.check(d_model=3584, n_layers=42)
    assert hub.downloads == []
    assert suite.specs[0].identity == (
        f"google/gemma-scope-2b-pt-res@{'c0ffee' * 6}abcd/layer_0/width_16k/average_l0_90/params.npz"
    )
    # The file is smaller than the repository's name says, which is found on reading.
    with pytest.raises(SaeError, match="its name or configuration says 16384 features over d_model 2304"):
        suite[1].rows([0])
    assert hub.downloads == ["layer_1/width_16k/average_l0_90/params.npz"]


def test_hub_of_other_activations_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gemma_scope(tmp_path, 0, 90, width="16k")
    hub = Hub(tmp_path, monkeypatch)
    with pytest.raises(SaeError, match="gemma-scope-2b-pt-res"):
        load_suite("google/gemma-scope-2b-pt-mlp")
    assert hub.downloads == []


def test_hub_gemma_scope_2_knows_its_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for size, l0 in (("small", 15), ("big", 110)):
        config = {"l0": l0, "hf_hook_point_in": "model.layers.2.output"}
        gemma_scope_2(tmp_path, f"resid_post_all/layer_2_width_16k_l0_{size}", config=config)
        gemma_scope_2(tmp_path, f"resid_post_all/layer_2_width_262k_l0_{size}", config=config)
    hub = Hub(tmp_path, monkeypatch)
    suite = load_suite("google/gemma-scope-2-4b-it", width="16k")
    assert (suite.specs[0].d_model, suite.specs[0].d_sae, suite.specs[0].average_l0) == (2560, 16384, 110)
    assert {Path(file).name for file in hub.downloads} == {"config.json"}


def test_a_folder_of_a_repository_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for site in ("resid_post_all", "transcoder_all"):
        gemma_scope_2(tmp_path, f"{site}/layer_2_width_16k_l0_big")
    hub = Hub(tmp_path, monkeypatch)
    assert load_suite("google/gemma-scope-2-4b-it").reads == {}
    suite = load_suite("google/gemma-scope-2-4b-it/transcoder_all")
    assert (hub.repo, suite.reads, hub.downloads) == ("google/gemma-scope-2-4b-it", {2: "mlp_in"}, [])
    with pytest.raises(SaeError, match="holds no SAEs in a known layout"):
        load_suite("google/gemma-scope-2-4b-it/transcoder")


def test_hub_of_unknown_name_reads_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    llama_scope(tmp_path, 5)
    hub = Hub(tmp_path, monkeypatch)
    suite = load_suite("fnlp/Llama3_1-8B-Base-LXR-8x")
    suite.check(d_model=D_MODEL, n_layers=6)
    assert hub.downloads == ["Llama3_1-8B-Base-L5R-8x/hyperparams.json"]
    assert suite[5].rows([1, 2]).w_dec.shape == (2, D_MODEL)


def offline(*_: Any, **__: Any) -> Any:
    raise ConnectionError("no route to host")


def test_hub_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SaeError, match=r"o/n cannot be listed \(no route to host\), and nothing of it is"):
        load_suite("o/n")


@pytest.mark.parametrize("variable", ["DEMUR_OFFLINE", "HF_HUB_OFFLINE"])
def test_known_to_be_offline_the_hub_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str):
    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SaeError, match=r"o/n cannot be listed \(downloads are switched off\), and nothing of it is"):
        load_suite("o/n")


def test_download_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gemma_scope(tmp_path, 0, 90, width="16k")
    Hub(tmp_path, monkeypatch)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    suite = load_suite("google/gemma-scope-2b-pt-res")
    with pytest.raises(SaeError, match=r"average_l0_90/params\.npz cannot be downloaded: no route to host"):
        suite[0].rows([0])


@pytest.mark.parametrize("incomplete", [False, True])
def test_cached_files_serve_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, incomplete: bool):
    commit = "0123456789" * 4
    repo = tmp_path / "models--o--n"
    gemma_scope(repo / "snapshots" / commit, 3, 90)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    if incomplete:

        class IncompleteSnapshotError(Exception):
            snapshot_path = str(repo / "snapshots" / commit)

        def raising(*_: Any, **__: Any) -> Any:
            raise IncompleteSnapshotError("3 files are missing")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", raising)
    download = huggingface_hub.hf_hub_download

    def local(*args: Any, local_files_only: bool, **options: Any) -> str:
        assert local_files_only, "the network was asked once and need not be asked again"
        return download(*args, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", local)
    sae = load_suite("o/n")[3]
    assert sae.rows([0]).indices == (0,)
    assert sae.spec.identity == f"o/n@{commit}/layer_3/width_16/average_l0_90/params.npz"
    assert "(cached files only)" in sae.spec.source


# the small trained model


@pytest.mark.shared
def test_trained_suite_follows_the_nearest_l0_rule(shared: Path):
    suite = load_suite(shared / "organism-en" / "saes", average_l0=20)
    chosen = json.loads((shared / "golden" / "selection.json").read_text())["saes"]
    assert {str(spec.layer): spec.source.split("/")[-2] for spec in suite.specs} == chosen
    suite.check(d_model=128, n_layers=8)
    for sae in suite.values():
        rows, dense_sae = sae.rows([0, 700, 1023]), sae.dense()
        assert torch.equal(rows.w_dec, dense_sae.w_dec[[0, 700, 1023]])
        assert torch.equal(rows.w_enc, dense_sae.w_enc[:, [0, 700, 1023]])
