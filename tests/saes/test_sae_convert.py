"""Pickled checkpoints: what they hold arrives, nothing in them runs, and errors say what was found and expected."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_files import D_MODEL, random_weights

from command_line import run
from demur.errors import InputError, SaeError
from demur.saes import load_suite
from demur.saes.convert import convert

X = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(7))


def weights() -> dict[str, torch.Tensor]:
    return random_weights(3)


def dictionary_learning() -> dict[str, torch.Tensor]:
    """As dictionary_learning names and turns them."""
    w = weights()
    return {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "b_dec": w["b_dec"],
    }


def test_a_state_dict_of_dictionary_learning(tmp_path: Path) -> None:
    w = weights()
    file = tmp_path / "resid_post_layer_3" / "trainer_1" / "ae.pt"
    file.parent.mkdir(parents=True)
    torch.save(dictionary_learning() | {"threshold": torch.tensor(0.7), "k": torch.tensor(4)}, file)
    ran = run("saes", "convert", file, "--out", tmp_path / "out")
    assert ran.code == 0, ran.error
    assert "dictionary_learning, layer 3, jumprelu, 16 features over 6, input centred on the decoder's bias" in ran.out
    sae = load_suite(tmp_path / "out")[3].dense()
    pre = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = pre * (pre > 0.7)
    torch.testing.assert_close(sae.encode(X), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(X)), f @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_around_a_state_dict(tmp_path: Path) -> None:
    """Early SAELens: a configuration beside the state dict; ReLU, as there are neither thresholds nor k."""
    state = {name: each for name, each in weights().items() if name != "threshold"}
    torch.save({"cfg": {"d_sae": 16, "name": "x"}, "state_dict": state}, tmp_path / "sae.pkl")
    found = convert(tmp_path / "sae.pkl", tmp_path / "out", layer=2, centred=False)
    assert (found.layout, found.centred, load_suite(tmp_path / "out")[2].spec.activation) == ("SAELens", False, "relu")
    torch.testing.assert_close(found.sae.encode(X), (X @ state["W_enc"] + state["b_enc"]).relu())


def test_a_topk_checkpoint_that_also_stores_a_threshold(tmp_path: Path) -> None:
    torch.save(dictionary_learning() | {"threshold": torch.tensor(0.1), "k": torch.tensor(3)}, tmp_path / "l7.pt")
    found = convert(tmp_path / "l7.pt", tmp_path / "out", layer=7, activation="topk").sae
    assert (found.activation, found.k, load_suite(tmp_path / "out")[7].spec.k) == ("topk", 3, 3)
    assert bool(((found.encode(X) > 0).sum(1) <= 3).all())


class Payload:
    """What a hostile checkpoint holds: unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", ["torch", 2])
def test_a_hostile_pickle_is_refused_and_does_not_run(protocol: str | int, tmp_path: Path) -> None:
    target, file = tmp_path / "it-ran", tmp_path / "layer_4.pkl"
    hostile = {**weights(), "metadata": Payload(target)}
    if protocol == "torch":
        torch.save(hostile, file)
    else:
        file.write_bytes(pickle.dumps(hostile, protocol=int(protocol)))
    with pytest.raises(SaeError, match=r"layer_4\.pkl cannot be read as a checkpoint of tensors alone .*Nothing in it"):
        convert(file, tmp_path / "out")
    assert not target.exists()
    assert not (tmp_path / "out").exists()
    # Opened as any pickle, it runs.
    if protocol != "torch":
        pickle.loads(file.read_bytes())
        assert target.exists()


@pytest.mark.slow
def test_reading_has_a_limit_of_memory(tmp_path: Path) -> None:
    torch.save({**weights(), "filler": torch.zeros(100_000_000 // 4)}, tmp_path / "layer_1.pt")
    with pytest.raises(SaeError, match="cannot be read"):
        convert(tmp_path / "layer_1.pt", tmp_path / "out", gigabytes=0.02)
    assert convert(tmp_path / "layer_1.pt", tmp_path / "out").sae.layer == 1


def test_errors_name_the_file_and_what_was_found_and_expected(tmp_path: Path) -> None:
    file = tmp_path / "layer_1.pt"
    torch.save({"model": {"foo": torch.zeros(2), "bar": 1.5}}, file)
    expected = r"layer_1\.pt holds model\.bar, model\.foo; expected W_enc, b_enc, W_dec, b_dec; or"
    with pytest.raises(SaeError, match=expected):
        convert(file, tmp_path / "out")
    torch.save({name: each for name, each in weights().items() if name != "threshold"}, file)
    with pytest.raises(SaeError, match="a jumprelu SAE needs one of threshold, log_threshold, topk_threshold"):
        convert(file, tmp_path / "out", activation="jumprelu")
    with pytest.raises(InputError, match="there is no checkpoint"):
        convert(tmp_path / "none.pt", tmp_path / "out")
    torch.save(weights(), tmp_path / "sae.pt")
    with pytest.raises(InputError, match=r"sae\.pt does not say of which layer it is; give --layer"):
        convert(tmp_path / "sae.pt", tmp_path / "out")
