"""Transcoders: layouts against weights that are known, places against real classes, and what is refused, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_files import D_MODEL, D_SAE, gemma_scope_2, random_weights
from safetensors.torch import load_file, save_file

from demur.errors import SaeError
from demur.model import ChatModel
from demur.saes import HookError, load_saes, load_suite
from demur.testing import tiny_model

X = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(9))
SKIP = torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(8))


def circuit_tracer(folder: Path, layers: tuple[int, ...] = (0, 1), skip: bool = False, **config: Any) -> Path:
    """A set as circuit-tracer reads it: encoders features first, `W_skip` outputs first."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "model_name": "Qwen/Qwen3-4B",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
    } | config
    threshold = values.pop("threshold", False)
    (folder / "config.yaml").write_text("".join(f"{k}: {v}\n" for k, v in values.items() if v is not None))
    for layer in layers:
        weights = random_weights(layer)
        tensors = {"W_enc": weights["W_enc"].T, **{name: weights[name] for name in ("W_dec", "b_enc", "b_dec")}}
        tensors |= {"activation_function.threshold": weights["threshold"]} if threshold else {}
        tensors |= {"W_skip": SKIP} if skip else {}
        save_file({name: each.contiguous() for name, each in tensors.items()}, folder / f"layer_{layer}.safetensors")
    return folder


def pre(layer: int) -> torch.Tensor:
    weights = random_weights(layer)
    return X @ weights["W_enc"] + weights["b_enc"]


def test_a_circuit_tracer_set_is_read_layer_by_layer(tmp_path: Path) -> None:
    suite = load_suite(circuit_tracer(tmp_path, skip=True))
    assert suite.layers == (0, 1)
    assert suite.reads == {0: "mlp_in", 1: "mlp_in"}
    spec = suite.specs[1]
    assert (spec.writes, spec.activation, spec.d_model, spec.d_sae) == ("mlp_out", "relu", D_MODEL, D_SAE)
    assert "2 transcoders on layers 0–1" in suite.describe()
    dense, weights = suite[1].dense(), random_weights(1)
    features = torch.relu(pre(1))
    torch.testing.assert_close(dense.encode(X), features)
    torch.testing.assert_close(suite[1].rows([7, 2]).encode(X), features[:, [7, 2]])
    made = features @ weights["W_dec"] + weights["b_dec"] + X @ SKIP.T
    torch.testing.assert_close(dense.decode(features, X), made)
    with pytest.raises(SaeError, match="layer 1 has a skip connection: decode with what it read"):
        dense.decode(features)


def test_its_activation_is_what_configuration_or_file_says(tmp_path: Path) -> None:
    jump = load_suite(circuit_tracer(tmp_path / "jump", threshold=True))[0]
    assert jump.spec.activation == "jumprelu"
    torch.testing.assert_close(jump.dense().encode(X), pre(0) * (pre(0) > random_weights(0)["threshold"]))
    top = load_suite(circuit_tracer(tmp_path / "top", activation="topk", k=3))[0]
    assert (top.spec.activation, top.spec.k) == ("topk", 3)
    kept = (top.dense().encode(X) > 0).sum(-1)
    assert kept.max() == 3
    # Before the norm, as some sets are trained.
    assert load_suite(circuit_tracer(tmp_path / "mid", feature_input_hook="hook_resid_mid")).reads[0] == "resid_mid"


def test_equal_weights_at_other_places_are_other_dictionaries(tmp_path: Path) -> None:
    inside, before = (
        load_suite(circuit_tracer(tmp_path / name, feature_input_hook=hook)).identity
        for name, hook in (("in", "mlp.hook_in"), ("mid", "hook_resid_mid"))
    )
    assert inside != before
    dense = load_suite(tmp_path / "in")[0].dense()
    assert dense.sae().spec.reads == "mlp_in"
    with pytest.raises(SaeError, match="reads mlp_in and writes mlp_out; only SAEs are written"):
        dense.save_saelens(tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_kind": "cross_layer_transcoder"}, "is a cross_layer_transcoder; demur takes transcoders of single"),
        ({"feature_input_hook": "ln2.hook_normalized"}, r"reads 'ln2\.hook_normalized'; demur takes .*mlp\.hook_in"),
        ({"feature_output_hook": "hook_resid_post"}, "writes 'hook_resid_post'; demur takes"),
        ({"model_name": "google/gemma-3-1b-it"}, "before the norm behind Gemma's MLP; demur needs hook_mlp_out"),
        ({"activation": "gelu"}, "activation 'gelu' has no canonical form; demur reads relu, jumprelu and topk"),
        ({"activation": "topk"}, "`k`, the features kept per token, is missing"),
        (
            {"transcoders": "\n- hf://google/gemma-scope-2-1b-it/transcoder_all/layer_0_width_16k/params.safetensors"},
            "name that one: google/gemma-scope-2-1b-it/transcoder_all",
        ),
    ],
)
def test_other_sets_are_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(SaeError, match=message):
        load_suite(circuit_tracer(tmp_path, **config))


def test_numbered_files_without_that_configuration_are_no_transcoders(tmp_path: Path) -> None:
    circuit_tracer(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(SaeError, match=r"no SAEs in a known layout; known are: .*circuit-tracer transcoders"):
        load_suite(tmp_path)


def gemma(root: Path, name: str, **config: Any) -> Path:
    hooks = {
        "hf_hook_point_in": "model.layers.4.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.4.post_feedforward_layernorm.output",
        "type": "transcoder",
        "l0": 80,
    }
    return gemma_scope_2(root, name, config=hooks | config)


def test_gemma_scope_2_transcoders(tmp_path: Path) -> None:
    folder = gemma(tmp_path, "transcoder_all/layer_4_width_16_l0_big_affine")
    path = folder / "params.safetensors"
    save_file(load_file(path) | {"affine_skip_connection": SKIP}, path)
    suite = load_suite(tmp_path)
    assert suite.reads == {4: "mlp_in"}
    assert suite.specs[0].average_l0 == 80
    dense, weights = suite[4].dense(), random_weights(0)
    features = pre(0) * (pre(0) > weights["threshold"])
    torch.testing.assert_close(dense.encode(X), features)
    torch.testing.assert_close(dense.decode(features, X), features @ weights["W_dec"] + weights["b_dec"] + X @ SKIP)
    # A release has both kinds: the residual's are meant unless the folder is named.
    gemma_scope_2(tmp_path, "resid_post_all/layer_4_width_16_l0_big")
    assert load_suite(tmp_path).reads == {}
    assert load_suite(tmp_path / "transcoder_all").reads == {4: "mlp_in"}


def test_gemma_scope_2_transcoders_of_other_places_are_refused(tmp_path: Path) -> None:
    gemma(tmp_path, "transcoder_all/layer_4_width_16_l0_big", hf_hook_point_out="model.layers.4.output")
    with pytest.raises(HookError, match=r"writes 'model\.layers\.4\.output'; demur takes transcoders"):
        load_suite(tmp_path)
    gemma(tmp_path / "other", "transcoder_all/layer_3_width_16_l0_big")
    with pytest.raises(SaeError, match="the folder is of layer 3"):
        load_suite(tmp_path / "other")
    gemma_scope_2(tmp_path / "attn", "attn_out_all/layer_0_width_16_l0_big")
    with pytest.raises(HookError, match=r"attn_out_all; demur takes the SAEs under resid_post_all .*transcoder_all"):
        load_suite(tmp_path / "attn")


def test_models_whose_mlp_is_not_known_are_refused(tmp_path: Path) -> None:
    suite = load_suite(circuit_tracer(tmp_path))
    suite.check(d_model=D_MODEL, n_layers=2, model_type="qwen3")
    with pytest.raises(SaeError, match=r"types llama, mistral, .*gemma3_text, not in phi3"):
        suite.check(d_model=D_MODEL, n_layers=2, model_type="phi3")
    tiny = ChatModel(*tiny_model("gemma2", n_layers=3, d_model=8), name="tiny")
    with pytest.raises(SaeError, match="width 6, but the model's are 8"):
        load_saes(tiny, tmp_path)
