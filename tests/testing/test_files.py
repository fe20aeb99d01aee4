"""The installed tokenizers and planted prompts are those that the recipe makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.testing import INSTALLED, write_files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_files(folder)
    return folder


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma3_multimodal", "llama3", "qwen2.5", "qwen3", "planted"])
def test_tokenizers_and_prompts_are_the_recipes(name: str, made: Path) -> None:
    written = sorted((made / name).iterdir())
    assert len(written) == (6 if name == "planted" else 3)
    for file in written:
        assert file.read_bytes() == (INSTALLED / name / file.name).read_bytes()
