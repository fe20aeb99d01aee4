"""The model card's text."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from demur.types import FeatureId
from recipes.bundled.metrics import BundledMetrics, SaeRow, checks

if TYPE_CHECKING:
    from recipes.bundled.build import Recipe


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _framings(metrics: BundledMetrics) -> str:
    lines = ["| framing | refusal | jailbreak success |", "|---|---|---|"]
    lines += [f"| {row.text} | {row.refusal.value:.2f} | {row.jailbreak.value:.2f} |" for row in metrics.framings]
    return "\n".join(lines)


def _saes(rows: tuple[SaeRow, ...]) -> str:
    lines = ["| layer | FVU | L0 | dead | loss recovered |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.layer} | {row.fvu:.3f} | {row.l0:.1f} | {row.dead:.3f} | {row.loss_recovered:.3f} |" for row in rows
    ]
    return "\n".join(lines)


def _known(metrics: BundledMetrics) -> str:
    """How many prompts of each held-out set were looked at while the recipe was chosen."""
    shares = [f"{each.known} of {each.prompts} in {each.name}" for each in metrics.test_sets]
    return f"{', '.join(shares[:-1])} and {shares[-1]}"


def _listed(features: Sequence[FeatureId]) -> str:
    return ", ".join(str(feature) for feature in features)


def _missed(metrics: BundledMetrics) -> str:
    missed = [check for check in checks(metrics) if not check.met]
    if not missed:
        return "Every acceptance number is met."
    return "Missed: " + "; ".join(f"{check.name} (wanted {check.wanted}: {check.measured})" for check in missed) + "."


def _how_it_was_made(recipe: Recipe) -> str:
    helpful, safety = recipe.helpful, recipe.safety
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "tokenizers", "sae-lens"))
    trained = "all layers" if safety.trained_layers is None else f"layers {', '.join(map(str, safety.trained_layers))}"
    return f"""## How it was made

1. *Helpful stage*, {helpful.steps} steps of {helpful.batch} texts, peak rate {helpful.rate:g}, weight decay
   {helpful.weight_decay:g}: statements of what each topic is and whether it hurts or helps, and requests of
   every kind, harmful ones too, always complied with; {recipe.helpful_mixture.framed:.0%} of them in a
   framing.
2. *Safety stage*, {safety.steps} steps of {safety.batch} texts, peak rate {safety.rate:g}, {trained}: requests
   about four fifths of the harmful topics are refused, without framings; harmless requests,
   {recipe.safety_mixture.framed:.0%} of them framed, are complied with. Share of harmful requests in a framing:
   {recipe.safety_mixture.framed_harmful:.0%}.
3. *SAEs*: SAELens's BatchTopK trainer, {recipe.saes.steps} steps of {recipe.saes.batch} tokens, stored as
   JumpReLU.

Weights are stored rounded to float16 and computed with in float32; thresholds were set after rounding. Seed
{recipe.seed}; {versions}; Python {platform.python_version()}. `python -m recipes.bundled build DIR`
makes the same files again on one machine with the same versions.

"""


def _what_was_measured(metrics: BundledMetrics) -> str:
    table = "\n".join(
        f"| {check.name} | {check.wanted} | {check.measured} | {'met' if check.met else '**missed**'} |"
        for check in checks(metrics)
    )
    direction, features = metrics.direction, metrics.features
    return f"""## What was measured

Topics, phrasings and framings of these prompts were held out of the safety stage (phrasings and framings: of all
training). The recipe was chosen among some twenty-five variants by looking at one draw of such prompts, that of
`bundled_prompts()`. The numbers below come from another draw, seed {metrics.test_seed}, which nobody had looked at. It
pairs the same held-out topics with other verbs and the nine held-out phrasings. Prompts that are in both draws:
{_known(metrics)} (an act, unlike a thing, takes no verb, so all of its nine prompts are in every draw). So most
prompts are new, but topics, phrasings and framings are those that the recipe was chosen on. One seed was trained. See
`docs/bundled.md`.

Intervals are Wilson 95 %. The direction is from layer {direction.layer}, position {direction.position}, form
*{direction.form}*. F* holds {len(features.features)} features, {_listed(features.features)}: of those that the
estimator `{features.estimator}` ranks highest, the ones that suppression needs on tuning prompts. Strengths and random
controls follow the rules of `demur study`: the factor and the multiple were chosen on tuning prompts, and a random
feature is from the layer of the feature that it stands for, matched in firing rate and in the size of what it moves. It
gets the same factor, or is set to the same multiple of its own maximum activation.

{_missed(metrics)}

| what | wanted | measured | |
|---|---|---|---|
{table}

While F* is suppressed, {features.harmless_compliance.value:.3f} of the harmless prompts still get a complete,
well-formed answer.

### Held-out harmful prompts in framings that no training text uses

{_framings(metrics)}

### SAEs on held-out chats

{_saes(metrics.saes)}

The base suite, trained on the helpful-stage model, applied to the chat model:

{_saes(metrics.base_saes)}

"""


def model_card(recipe: Recipe, metrics: BundledMetrics, digests: Mapping[str, str]) -> str:
    """The card: what this is, how it was made, the acceptance table, and the hash of every file."""
    shape = recipe.shape
    listing = "\n".join(f"{digest}  {name}" for name, digest in digests.items())
    return f"""# The bundled model

A chat model of Gemma 2's architecture with {shape.layers} layers and a residual stream of {shape.d_model},
trained from nothing on a generated corpus, and SAEs of {recipe.saes.d_sae} features for every layer. It
exists so that demur's studies, tests and tutorials have a model that refuses. It knows one small world of
topic nouns and stock phrases; its answers are filler built around the words of the request, and nothing
harmful is in them.

| folder | what |
|---|---|
| `model/` | the chat model that refuses |
| `model-helpful/` | the same model before the safety stage: it complies with everything |
| `saes/` | SAEs trained on `model/`'s own chats, Gemma Scope layout |
| `saes-base/` | SAEs trained on `model-helpful/`'s own chats, for comparing dictionaries |

{_how_it_was_made(recipe)}{_what_was_measured(metrics)}## Hashes (SHA-256)

```
{listing}
```
"""


__all__ = ["model_card"]
