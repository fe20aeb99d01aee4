"""`paper` mode against the outputs of the paper's own code on a small trained model (float32, CPU)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demur.method.activations import feature_activations
from demur.method.attribution import Attribution, ScoredTokens, attribute
from demur.method.direction import position_means
from demur.method.interventions import (
    AblateDirection,
    AddDirection,
    Compiled,
    HoldFeatures,
    Intervention,
    PerPrompt,
    ScaleFeatures,
    SetFeatures,
    bind,
)
from demur.method.path import Metric
from demur.method.selection import cosine_pool, cossim_set, global_set, local_sets
from demur.model import ChatModel, TokenizedPrompt, load_model
from demur.saes import Suite, load_suite
from demur.types import FeatureId, Prompt

pytestmark = pytest.mark.shared

K, NEW_TOKENS, HEADER = 20, 24, 1


@dataclass(frozen=True)
class Golden:
    folder: Path
    model: ChatModel
    suite: Suite

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{name}.npz") as file:
            return {key: file[key] for key in file.files}

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        return self.json("prompts")

    @cached_property
    def selection(self) -> dict[str, Any]:
        return self.json("selection")

    @cached_property
    def global_features(self) -> tuple[FeatureId, ...]:
        return tuple(FeatureId(*each) for each in self.selection["global"])

    def rendered(self, label: str) -> list[TokenizedPrompt]:
        return self.model.tokenize(self.prompts[label])

    @cached_property
    def ids(self) -> list[str]:
        return [str(n) for n in range(len(self.prompts["harmful"]))]

    @cached_property
    def difference(self) -> torch.Tensor:
        harmful, harmless = (
            position_means(self.model, self.rendered(label), [-1])[:, 0] for label in ("harmful", "harmless")
        )
        return harmful - harmless

    @property
    def direction(self) -> torch.Tensor:
        return self.difference[self.selection["layer"]]

    def attribute(self, n: int, pool: dict[int, Any], *, positions: bool = False) -> Attribution:
        refusal = self.model.tokenizer.convert_tokens_to_ids("I")
        assert isinstance(refusal, int)
        return attribute(
            self.model,
            self.suite,
            self.rendered("harmful")[:n],
            pool,
            patch=Compiled(self.model, None, [AblateDirection(self.direction)]),
            metric=Metric((refusal,), allow_refusal_target=True),
            method="paper",
            steps=self.selection["steps"],
            scoring=ScoredTokens(header_tokens=HEADER),
            keep_positions=positions,
        )

    @cached_property
    def pool_attribution(self) -> Attribution:
        return self.attribute(16, cosine_pool(self.suite, self.direction, self.selection["K0"]).by_layer)

    def logits(self, label: str, *interventions: Intervention) -> torch.Tensor:
        batch = self.model.batch(self.rendered(label))
        with torch.inference_mode(), Compiled(self.model, self.suite, interventions).on(batch):
            return self.model.last_logits(batch)

    def texts(self, label: str, *interventions: Intervention) -> list[str]:
        prompts = [Prompt(id=str(n), text=t, label="harmful") for n, t in enumerate(self.prompts[label])]
        compiled = Compiled(self.model, self.suite, interventions)
        with self.model.intervene(compiled):
            return list(self.model.generate(prompts, max_new_tokens=NEW_TOKENS).texts)

    def local(self, factor: float) -> PerPrompt:
        sets = (tuple(FeatureId(*each) for each in features) for features in self.selection["local"])
        return PerPrompt({str(n): (ScaleFeatures(features, factor),) for n, features in enumerate(sets)})


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    organism = shared / "organism-en"
    return Golden(
        shared / "golden",
        load_model(organism / "model", device="cpu", dtype="float32"),
        load_suite(organism / "saes", average_l0=20),
    )


@pytest.mark.parametrize("label", ["harmful", "harmless", "adversarial"])
def test_tokens_are_those_of_one_left_padded_batch(golden: Golden, label: str) -> None:
    tokens = golden.arrays("tokens")
    batch = golden.model.batch(golden.rendered(label))
    np.testing.assert_array_equal(batch.input_ids.numpy(), tokens[f"{label}.input_ids"])
    np.testing.assert_array_equal(batch.attention_mask.numpy(), tokens[f"{label}.attention_mask"])


def test_nearest_l0_picks_the_folders_that_were_used(golden: Golden) -> None:
    for spec in golden.suite.specs:
        assert golden.selection["saes"][str(spec.layer)] in spec.source


def test_direction(golden: Golden) -> None:
    expected = golden.arrays("direction")["direction"]
    error = np.abs(golden.difference.numpy() - expected).max() / np.abs(expected).max()
    assert error < 1e-4


def test_pool_and_cossim(golden: Golden) -> None:
    pool = cosine_pool(golden.suite, golden.direction, golden.selection["K0"])
    assert {str(layer): list(indices) for layer, indices in pool.by_layer.items()} == golden.selection["pool"]
    found, expected = cossim_set(golden.suite, golden.direction, K), golden.json("cossim")
    assert [list(feature) for feature in found.features] == expected["features"]
    np.testing.assert_allclose(found.scores, expected["cosine"], rtol=1e-5)


def test_attribution_of_every_feature_at_every_token(golden: Golden) -> None:
    expected = golden.arrays("attribution_first4")
    everything = {layer: range(1024) for layer in golden.suite.layers}
    found = golden.attribute(4, everything, positions=True)
    assert found.by_position is not None
    largest = max(np.abs(values).max() for values in expected.values())
    for prompt, values in enumerate(found.by_position):
        for n, layer in enumerate(golden.suite.layers):
            theirs = expected[f"layer_{layer}"][prompt, -len(values) :]
            mine = values[:, n * 1024 : (n + 1) * 1024].numpy()
            assert np.abs(mine - theirs).max() < 1e-5 * largest


def _same_order(mine: list[FeatureId], scores: list[float], theirs: list[list[int]]) -> None:
    """Same set; same order wherever neighbouring scores differ by more than 1e-4 of the larger."""
    assert {tuple(each) for each in mine} == {tuple(each) for each in theirs}
    score = dict(zip([tuple(each) for each in mine], scores, strict=True))
    for first, second in pairwise(theirs):
        a, b = score[tuple(first)], score[tuple(second)]
        assert a >= b - 1e-4 * max(abs(a), abs(b))


def test_global_set(golden: Golden) -> None:
    found = global_set(golden.pool_attribution, K)
    _same_order(list(found.features), list(found.scores), golden.selection["global"])


def test_local_sets(golden: Golden) -> None:
    for found, expected in zip(local_sets(golden.pool_attribution, K), golden.selection["local"], strict=True):
        _same_order(list(found.features), list(found.scores), expected)


def test_a_prompt_still_refused_when_patched_has_no_attribution(golden: Golden) -> None:
    """The ablated run's most likely token is the refusal token itself, so the paper's metric is constant there."""
    flat = [n for n, row in enumerate(golden.pool_attribution.rows) if not any(row.totals)]
    refusal = golden.model.tokenizer.convert_tokens_to_ids("I")
    assert flat == [n for n, row in enumerate(golden.pool_attribution.rows) if row.target == refusal] != []


@pytest.mark.parametrize("name", ["none", "ablate", "scale_global_m3", "scale_local_m3", "set_global_1"])
def test_logits(golden: Golden, name: str) -> None:
    changes: dict[str, tuple[Intervention, ...]] = {
        "none": (),
        "ablate": (AblateDirection(golden.direction),),
        "scale_global_m3": (ScaleFeatures(golden.global_features, -3.0),),
        "scale_local_m3": (golden.local(-3.0),),
        "set_global_1": (SetFeatures(golden.global_features, 1.0),),
    }
    found = golden.logits("harmless" if name.startswith("set") else "harmful", *changes[name])
    np.testing.assert_allclose(found.numpy(), golden.arrays("logits_last")[name], atol=1e-3, rtol=0)


def _interventions(golden: Golden, name: str) -> tuple[Intervention, ...]:
    kind, _, value = name.partition("/")
    if kind == "none":
        return ()
    if kind == "ablate_direction":
        return (AblateDirection(golden.direction),)
    if kind == "add_direction":
        return (AddDirection(golden.direction, golden.selection["layer"]),)
    if kind == "scale_local":
        return (golden.local(float(value)),)
    if kind == "set_global":
        return (SetFeatures(golden.global_features, float(value)),)
    if kind == "scale8_hold8":
        held = golden.global_features[8:16]
        values = {prompt: (HoldFeatures(held, v),) for prompt, v in _clean(golden, "harmful", held).items()}
        return (ScaleFeatures(golden.global_features[:8], float(value)), PerPrompt(values))
    cossim = tuple(FeatureId(*each) for each in golden.json("cossim")["features"])
    return (ScaleFeatures({"scale_global": golden.global_features, "scale_cossim": cossim}[kind], float(value)),)


def _clean(golden: Golden, label: str, features: tuple[FeatureId, ...]) -> dict[str, torch.Tensor]:
    """Prompt id → activations `[pos, k]` of `features` in the plain run."""
    values = feature_activations(golden.model, golden.suite, golden.rendered(label), features)
    return dict(zip(golden.ids, values, strict=True))


_TEXTS = [
    *("harmful/none", "harmless/none", "adversarial/none", "harmful/ablate_direction", "harmless/add_direction"),
    *(f"harmful/scale_{which}/{c}" for which in ("global", "local", "cossim") for c in ("0", "-1", "-3")),
    *("harmless/scale_global/-3", "harmful/scale8_hold8/-3"),
    *(f"harmless/set_global/{v}" for v in ("0.5", "1.0", "2.0")),
]


@pytest.mark.parametrize("key", _TEXTS)
def test_greedy_texts_are_identical(golden: Golden, key: str) -> None:
    """Letter by letter, but for near ties.

    Processors add floats up in different orders, which moves logits by some 1e-5; in a broken text the two likeliest
    tokens can be nearer than that. Where a text differs, the golden one is fed to the model token by token, and at the
    first step at which the texts part, both tokens must be within 1e-3 of the likeliest: as near as logits have to be
    to the golden ones anyway.
    """
    label, _, name = key.partition("/")
    changes = _interventions(golden, name)
    expected: list[str] = golden.json("generations")[key]
    for n, (found, text) in enumerate(zip(golden.texts(label, *changes), expected, strict=True)):
        if found != text:
            behind = _behind_the_likeliest(golden, label, n, (text, found), changes)
            assert max(behind) < 1e-3, f"prompt {n}: {found!r} instead of {text!r}, {behind} behind the likeliest token"


def _behind_the_likeliest(
    golden: Golden, label: str, n: int, texts: tuple[str, str], changes: tuple[Intervention, ...]
) -> list[float]:
    """How far each text's token is behind the likeliest (logits) where the second text leaves the first."""
    (item,) = golden.model.tokenize([Prompt(id=str(n), text=golden.prompts[label][n])])
    first, second = (golden.model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    assert [golden.model.decode(ids) for ids in (first, second)] == list(texts)
    end = golden.model.eos_ids[0]
    step, tokens = next(
        (step, pair) for step, pair in enumerate(zip([*first, end], [*second, end], strict=False)) if pair[0] != pair[1]
    )
    # The intervention is bound to the prompt alone, so that values held there stop where the answer begins.
    ids = torch.tensor([[*item.ids, *first[:step]]])
    with torch.inference_mode(), Compiled(golden.model, golden.suite, changes).on(golden.model.batch([item])):
        logits = golden.model.hf(ids).logits[0, -1]
    return [float(logits.max() - logits[token]) for token in tokens]


def test_every_golden_text_is_compared(golden: Golden) -> None:
    assert set(_TEXTS) == set(golden.json("generations"))


@pytest.mark.parametrize("label", ["harmful", "harmless", "adversarial"])
def test_feature_values(golden: Golden, label: str) -> None:
    expected = golden.arrays("feature_values")[label]
    for n, values in enumerate(_clean(golden, label, golden.global_features).values()):
        np.testing.assert_allclose(values.numpy(), expected[n, -len(values) :], atol=1e-4, rtol=0)


def test_suppressing_upstream_features_moves_downstream_ones(golden: Golden) -> None:
    expected = golden.arrays("upstream")
    up = tuple(FeatureId(*each) for each in expected["upstream"].tolist())
    down = tuple(FeatureId(*each) for each in expected["downstream"].tolist())
    for name, changes in (("before", ()), ("after", (ScaleFeatures(up, -3.0),))):
        for n, item in enumerate(golden.rendered("harmful")):
            with golden.model.intervene(bind(golden.suite, *changes)):
                (values,) = feature_activations(golden.model, golden.suite, [item], down)
            np.testing.assert_allclose(values[-5:].mean(0), expected[name][n], atol=1e-3, rtol=0)
