"""A study's answers: the same prompts under one change after another, as `generate` of transformers writes them and as
demur does, which tries what it wrote before as a draft and lets rows go that have ended.

The conditions are like those of `demur study`: the clean model, F* scaled, and random sets of as many features. Both
arms use the same batches and the same hooks; every text must be equal.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

import demur
from demur.method.interventions import Compiled, ScaleFeatures
from demur.model import ChatModel, decode_greedily, fitting_threads
from demur.saes import Suite
from demur.types import FeatureId, Prompt
from perf import common

BATCH = 100
K, FACTORS, RANDOM = 20, (0.0, -1.0, -2.0), 5
"""Features of a set, strengths of the first one, and how many random sets there are."""


def conditions(suite: Suite, features: Sequence[FeatureId]) -> dict[str, tuple[ScaleFeatures, ...]]:
    """Name → what is done to the model."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> tuple[FeatureId, ...]:
        layers = torch.randint(len(suite.layers), (K,), generator=generator).tolist()
        sizes = [suite.specs[0].d_sae] * K
        indices = [int(torch.randint(size, (1,), generator=generator)) for size in sizes]
        return tuple({FeatureId(suite.layers[layer], index) for layer, index in zip(layers, indices, strict=True)})

    found: dict[str, tuple[ScaleFeatures, ...]] = {"clean": ()}
    found |= {f"F* × {factor:g}": (ScaleFeatures(tuple(features), factor),) for factor in FACTORS}
    return found | {f"random {n}": (ScaleFeatures(drawn(), 0.0),) for n in range(RANDOM)}


class Arms:
    """Both ways to write the answers of one set of prompts."""

    def __init__(self, model: ChatModel, suite: Suite, prompts: Sequence[Prompt], new_tokens: int) -> None:
        self.model, self.suite, self.new = model, suite, new_tokens
        self.batches = [model.batch(model.tokenize(prompts[n : n + BATCH])) for n in range(0, len(prompts), BATCH)]
        self.settings = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=list(model.eos_ids), pad_token_id=model.pad_id
        )

    def transformers(self, change: Sequence[ScaleFeatures], _known: object = None) -> dict[str, list[int]]:
        """Prompt id → tokens, by `generate`."""
        hf: Any = self.model.hf
        found: dict[str, list[int]] = {}
        hf.generation_config = self.settings
        for batch in self.batches:
            with torch.inference_mode(), Compiled(self.model, self.suite, change).on(batch):
                tokens = hf.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            rows = tokens[:, batch.input_ids.shape[1] :].tolist()
            found |= dict(zip(batch.prompt_ids, rows, strict=True))
        return {prompt: self._ended(tokens) for prompt, tokens in found.items()}

    def demur(self, change: Sequence[ScaleFeatures], known: Mapping[str, list[list[int]]]) -> dict[str, list[int]]:
        """Prompt id → tokens, with `known` answers as drafts."""
        found: dict[str, list[int]] = {}
        for batch in self.batches:
            with torch.inference_mode(), Compiled(self.model, self.suite, change).on(batch):
                rows = decode_greedily(
                    self.model, batch, self.new, [known.get(prompt, ()) for prompt in batch.prompt_ids]
                )
            found |= dict(zip(batch.prompt_ids, rows, strict=True))
        return {prompt: self._ended(tokens) for prompt, tokens in found.items()}

    def _ended(self, tokens: list[int]) -> list[int]:
        return tokens[: next((n for n, token in enumerate(tokens) if token in self.model.eos_ids), len(tokens))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="model (default: the bundled one, its SAEs and prompts)")
    parser.add_argument("--saes", help="SAEs of the model")
    parser.add_argument("--harmful", help="harmful prompts")
    parser.add_argument("--harmless", help="harmless prompts")
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    model = demur.load_model(options.model)
    suite = demur.load_saes(model, options.saes)
    sources = {"harmful": options.harmful, "harmless": options.harmless} if options.model else {}
    prompts = demur.load_prompts(**sources)
    with fitting_threads(model.device, model.n_parameters):
        found = demur.find_features(model, suite, prompts, k=K)
        _run(
            Arms(model, suite, list(prompts.test.harmful), options.new_tokens),
            conditions(suite, found.features.features),
        )


def _run(arms: Arms, changes: Mapping[str, tuple[ScaleFeatures, ...]]) -> None:
    known: dict[str, list[list[int]]] = {}
    rows: list[list[str]] = []
    totals = {"transformers": 0.0, "demur": 0.0}
    for name, change in changes.items():
        seconds: dict[str, float] = {}
        found: dict[str, dict[str, list[int]]] = {}
        for arm, write in (("transformers", arms.transformers), ("demur", partial(arms.demur, known=known))):
            start = time.perf_counter()
            found[arm] = write(change)
            seconds[arm] = time.perf_counter() - start
            totals[arm] += seconds[arm]
        different = sum(found["transformers"][prompt] != tokens for prompt, tokens in found["demur"].items())
        if different:
            raise common.Disagreement(f"{name}: {different} of {len(found['demur'])} texts differ")
        for prompt, tokens in found["demur"].items():
            known[prompt] = [*(each for each in known.get(prompt, []) if each != tokens), tokens]
        rows.append([name, f"{seconds['transformers'] / seconds['demur']:.1f}×"])
    rows.append(["all", f"{totals['transformers'] / totals['demur']:.1f}×"])
    print(common.table(["condition", "transformers ÷ demur"], rows))
    print(json.dumps({"benchmark": "answers", "model": arms.model.name, "rows": rows, "new_tokens": arms.new}))


if __name__ == "__main__":
    main()
