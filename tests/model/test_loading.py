"""Checkpoints that cannot be studied are refused in one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from demur.errors import ModelError
from demur.model import ChatModel
from demur.testing import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama3", tmp_path / "model")


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the checkpoint, or (None) drop them; names have `__` for dots."""
    tensors = load_file(folder / "model.safetensors")
    for name, values in changes.items():
        name = name.replace("__", ".")
        assert name in tensors
        if values is None:
            del tensors[name]
        else:
            tensors[name] = values
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_named_not_made_up(folder: Path) -> None:
    rewrite(folder, model__layers__1__mlp__up_proj__weight=None, model__norm__weight=None)
    with pytest.raises(ModelError, match=r"lacks weights.*model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight"):
        ChatModel.load(folder, device="cpu")


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.ones(7))
    with pytest.raises(ModelError, match=r"in another shape: model\.norm\.weight"):
        ChatModel.load(folder, device="cpu")


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama3", "qwen2.5", "qwen3"])
def test_weights_that_are_tied_are_not_missing(tmp_path: Path, family: Any) -> None:
    ChatModel.load(save_tiny(family, tmp_path / "model"), device="cpu")


def test_a_cut_off_file_is_one_line(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"damaged or cut off.*download it again") as error:
        ChatModel.load(folder, device="cpu")
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_named(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.tensor([1.0, float("nan")] + [1.0] * 30))
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds NaN or infinity, first at \(1,\)"):
        ChatModel.load(folder, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_one_line(folder: Path, device: str) -> None:
    with pytest.raises(ModelError, match=rf"--device {device}: this machine has 0 CUDA GPUs.*--device cpu"):
        ChatModel.load(folder, device=device)


def test_code_that_a_repository_brings_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        cls = getattr(transformers, name)
        real = cls.from_pretrained

        def recorded(*args: Any, real: Any = real, **options: Any) -> Any:
            asked.append(options.get("trust_remote_code"))
            return real(*args, **options)

        monkeypatch.setattr(cls, "from_pretrained", recorded)
    ChatModel.load(folder, device="cpu")
    assert len(asked) >= 3
    assert set(asked) == {False}
    # A repository that needs its own code is refused, and the code stays unread.
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="cannot load the model"):
        ChatModel.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("stored", "has", "dtype", "expected"),
    [
        ("bfloat16", {}, "auto", torch.float32),
        ("bfloat16", {"avx512_bf16": True}, "auto", torch.bfloat16),
        ("bfloat16", {"bf16": True}, "auto", torch.bfloat16),
        ("float16", {"avx512_bf16": True}, "auto", torch.float32),
        ("float32", {"avx512_bf16": True}, "auto", torch.float32),
        ("bfloat16", {}, "bfloat16", torch.bfloat16),
        ("float32", {}, "bfloat16", torch.bfloat16),
    ],
)
def test_a_cpu_computes_in_what_it_multiplies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stored: str, has: dict[str, bool], dtype: str, expected: torch.dtype
) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": stored}))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert ChatModel.load(folder, device="cpu", dtype=dtype).dtype == expected
