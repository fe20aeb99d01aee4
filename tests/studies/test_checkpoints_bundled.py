"""The rule on a trained model: the bundled one with its weights half way, its readout cut, and a grain of noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import demur
from demur.bundled import BundledJudge, bundled_path
from demur.model import ChatModel
from demur.studies import STUDIES
from demur.studies.checkpoints import PairRows
from demur.studies.config import load_config
from demur.studies.context import run_study
from demur.studies.inputs import Inputs

pytestmark = pytest.mark.slow

_SMALL = {"direction_layer": 6, "max_new_tokens": 12}
_N = "24,16,8,48"


def _changed(name: str, change: Callable[[Any], None]) -> ChatModel:
    made = demur.load_model(device="cpu")
    with torch.no_grad():
        change(made.hf)
    return ChatModel(made.hf, made.tokenizer, name=name)


def _noisy(hf: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for weight in hf.parameters():
        weight += 1e-3 * weight.std() * torch.randn(weight.shape, generator=generator)


def _half_way(hf: Any) -> None:
    before = ChatModel.load(bundled_path().helpful_model, device="cpu").hf
    for weight, old in zip(hf.parameters(), before.parameters(), strict=True):
        weight.lerp_(old, 0.5)


def _unread(rows: Tensor) -> Callable[[Any], None]:
    """The readout is blind to the span of some decoder rows; what is written stays."""

    def change(hf: Any) -> None:
        basis = torch.linalg.qr(rows.T).Q  # pyright: ignore
        gain = 1 + hf.model.norm.weight
        hf.config.tie_word_embeddings = False
        seen = hf.lm_head.weight * gain
        hf.lm_head.weight = torch.nn.Parameter((seen - (seen @ basis) @ basis.T) / gain, requires_grad=False)

    return change


@pytest.fixture(scope="module", name="pairs")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PairRows]:
    chat, prompts = demur.load_model(device="cpu"), demur.load_prompts(n=_N)
    saes = demur.load_saes(chat)
    folder = tmp_path_factory.mktemp("bundled")
    features = demur.find_features(chat, saes, prompts, out=folder, **_SMALL).features.features  # pyright: ignore
    rows = torch.cat([saes[f.layer].rows([f.index]).w_dec for f in features])
    models = {"chat": chat, "noise": _changed("noise", _noisy), "half": _changed("half", _half_way),
              "cut": _changed("cut", _unread(rows))}  # fmt: skip

    def run(after: str, before: str) -> PairRows:
        study = STUDIES["checkpoints"]
        config = load_config(None, {**_SMALL, "random_sets": 6, "n_answers": 0, "n_alone": 2}, study.config)
        inputs = Inputs(after, "bundled", models[after], saes, prompts, BundledJudge())
        inputs = replace(inputs, before={before: replace(inputs, title=before, model=models[before])})
        return run_study(study, config, folder, inputs=inputs).pairs[0]

    return run


@pytest.mark.parametrize(
    ("after", "before", "kind"),
    [
        ("chat", "half", "amplified"),
        ("half", "chat", "weakened"),
        ("cut", "chat", "hidden"),
        ("noise", "chat", "no change"),
    ],
)
def test_known_changes_of_a_trained_model(pairs: Callable[..., PairRows], after: str, before: str, kind: str) -> None:
    verdict = pairs(after, before).verdict
    assert verdict.kind == kind, verdict.conditions


def test_the_folder_of_a_run_keeps_models_apart(pairs: Callable[..., PairRows]) -> None:
    first, second = pairs("chat", "half"), pairs("half", "chat")
    assert first.mechanisms["after"].own.value == pytest.approx(second.mechanisms["before"].own.value)
    assert first.mechanisms["after"].carried.value < 0.9
