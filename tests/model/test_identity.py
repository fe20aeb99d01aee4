"""Two checkpoints never share an identity."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from demur.errors import ModelError
from demur.model import ChatModel, model_identity
from demur.testing import save_tiny


def identity(folder: Path) -> dict[str, str]:
    return dict(model_identity(ChatModel.load(folder, device="cpu")))


def test_anything_that_moves_a_number_moves_the_identity(tmp_path: Path) -> None:
    folder = save_tiny("llama3", tmp_path / "model")
    seen = [identity(folder)]
    assert identity(folder) == seen[0]
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "layers.2" in name and tensors[name].ndim == 2)
    tensors[name][0, 0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    seen.append(identity(folder))
    settings = folder / "generation_config.json"
    settings.write_text(settings.read_text().replace("{", '{"max_length": 77,', 1))
    seen.append(identity(folder))
    template = next(folder.glob("*.jinja"))
    template.write_text(template.read_text() + " ")
    seen.append(identity(folder))
    assert len({str(sorted(each.items())) for each in seen}) == len(seen)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_a_change_anywhere_in_a_file_changes_the_identity(tmp_path: Path, place: float) -> None:
    folder = save_tiny("llama3", tmp_path / "model")
    model = ChatModel.load(folder, device="cpu")
    before = model_identity(model)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[round(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    assert model_identity(model)["content"] != before["content"]


def test_a_base_model_is_found_out_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = save_tiny("gemma2", tmp_path / "model")
    next(folder.glob("*.jinja")).unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        ChatModel.load(folder)


def test_an_unknown_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="unknown device 'tpu9'"):
        ChatModel.load(save_tiny("gemma2", tmp_path / "model"), device="tpu9")


def test_layers_spread_by_a_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder = save_tiny("gemma2", tmp_path / "model")
    assert identity(folder)["content"] == dict(model_identity(ChatModel.load(folder, device="balanced")))["content"]
