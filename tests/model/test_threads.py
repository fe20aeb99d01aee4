from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from demur.model import SMALL_MODEL, ChatModel, fitting_threads
from demur.testing import tiny_model


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_a_small_model_runs_on_one_thread_and_no_longer(threads: int) -> None:
    hf, tokenizer = tiny_model("llama3")
    model = ChatModel(hf, tokenizer, name="tiny")
    with fitting_threads(model.device, model.n_parameters):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads
    with pytest.raises(KeyError), fitting_threads(model.device, model.n_parameters):
        raise KeyError
    assert torch.get_num_threads() == threads


def test_a_large_model_or_one_on_a_gpu_keeps_its_threads(threads: int) -> None:
    for device, parameters in (("cpu", SMALL_MODEL + 1), ("cuda", 10)):
        with fitting_threads(torch.device(device), parameters):
            assert torch.get_num_threads() == threads
