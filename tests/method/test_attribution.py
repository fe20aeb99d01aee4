"""Attribution against autograd, exact patching done naively, and completeness."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from demur.errors import InputError, ModelError
from demur.method.attribution import (
    Attribution,
    AttributionSpec,
    Pool,
    PromptAttribution,
    ScoredTokens,
    attribute,
    attribute_batches,
    pool_features,
)
from demur.method.interventions import AblateDirection, Compiled
from demur.method.path import Method, Metric, estimator, run_ends, run_path
from demur.method.selection import attribute_dictionary
from demur.model import Budgets, ChatModel, Region, TokenizedPrompt, count_hooks, hooked
from demur.saes import ActivationName, Suite
from demur.testing import tiny_model, tiny_suite
from demur.types import FeatureId, Prompt

TEXTS = ["Tell me how to bake bread", "Hi", "Explain the rules of chess to a child", "Sing"]
IDS = ["0", "1", "2", "3"]
D_SAE = 24
POOL = {0: (1, 5, 9), 1: (3, 4), 3: (0, 2, 23)}
FEATURES = tuple(FeatureId(layer, i) for layer, indices in POOL.items() for i in indices)


@pytest.fixture(scope="module")
def model() -> ChatModel:
    hf, tokenizer = tiny_model("gemma2")
    return ChatModel(hf, tokenizer, name="gemma2")


@pytest.fixture(scope="module")
def suite(model: ChatModel) -> Suite:
    return tiny_suite(model.hf, d_sae=D_SAE)


@pytest.fixture(scope="module")
def patch(model: ChatModel) -> Compiled:
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3))
    return Compiled(model, None, [AblateDirection(vector)])


METRIC = Metric((11, 12))


def run(model: ChatModel, suite: Suite, patch: Compiled, **options: Any) -> Attribution:
    n = options.pop("n", len(TEXTS))
    options = {"pool": POOL, "metric": METRIC, **options}
    return attribute(model, suite, model.tokenize(TEXTS[:n]), patch=patch, **options)


def ends(
    model: ChatModel, patch: Compiled, text: str
) -> tuple[Any, dict[int, Tensor], dict[int, Tensor], int, float, float]:
    """Batch, clean and patched residuals, target token, metric of both, computed here without demur's own passes."""
    batch = model.batch(model.tokenize([text]))
    with torch.inference_mode():
        with model.capture() as clean:
            plain = model.last_logits(batch)
        with patch.on(batch), model.capture() as patched:
            moved = model.last_logits(batch)
    allowed = moved.clone()
    allowed[:, list(METRIC.refusal_ids)] = -math.inf
    target = int(allowed.argmax())

    def metric(logits: Tensor) -> float:
        return float(logits[0, target] - logits[0, list(METRIC.refusal_ids)].exp().sum().log())

    return batch, clean, patched, target, metric(plain), metric(moved)


def test_metric_by_hand() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 1.0, 1.0]])
    metric = Metric((0, 1))
    assert metric.targets(logits) == (3, 2)
    assert Metric((0, 1), allow_refusal_target=True).targets(logits) == (1, 0)
    expected = [2.0 - math.log(1 + math.exp(3)), 1.0 - math.log(math.exp(5) + 1)]
    assert metric(logits, (3, 2)).tolist() == pytest.approx(expected)
    # One refusal token: a plain difference of logits.
    assert Metric((0,))(logits, (3, 2)).tolist() == pytest.approx([2.0, -4.0])


def test_alphas() -> None:
    assert estimator("paper", 4).alphas == (0.0, 0.25, 0.5, 0.75)
    assert estimator("ig", 4).alphas == (0.125, 0.375, 0.625, 0.875)
    assert estimator("gradient", 4).alphas == (0.0,)
    with pytest.raises(InputError, match="at least 1 step"):
        estimator("ig", 0)


def test_gradient_is_the_derivative_by_autograd(model: ChatModel, suite: Suite, patch: Compiled) -> None:
    found = run(model, suite, patch, method="gradient", keep_positions=True)
    assert found.by_position is not None
    for row, text in enumerate(TEXTS):
        batch, clean, patched, target, *_ = ends(model, patch, text)
        expected: list[Tensor] = []
        for layer, indices in POOL.items():
            sae = suite[layer].dense()
            nudge = torch.zeros(1, batch.input_ids.shape[1], len(indices), requires_grad=True)
            decoder = sae.w_dec[list(indices)]
            with hooked(model.layers, {layer: lambda x, n=nudge, d=decoder: x + n @ d}):
                logits = model.last_logits(batch)
            (logits[0, target] - logits[0, list(METRIC.refusal_ids)].logsumexp(0)).backward()
            assert nudge.grad is not None
            change = (sae.encode(patched[layer]) - sae.encode(clean[layer]))[..., list(indices)]
            expected.append((nudge.grad * change)[0])
        torch.testing.assert_close(found.by_position[row], torch.cat(expected, -1).detach(), rtol=1e-4, atol=1e-5)
        assert found.rows[row].target == target


def test_exact_is_patching_one_feature_at_a_time(model: ChatModel, suite: Suite, patch: Compiled) -> None:
    found = run(model, suite, patch, method="exact")
    for row, text in enumerate(TEXTS):
        batch, clean, patched, target, before, after = ends(model, patch, text)
        scored = (batch.regions == Region.INSTRUCTION) | (batch.regions == Region.POST_INSTRUCTION)
        for column, feature in enumerate(FEATURES):
            sae = suite[feature.layer].dense()

            def dense(
                x: Tensor, sae: Any = sae, feature: FeatureId = feature, scored: Tensor = scored, patched: Any = patched
            ) -> Tensor:
                f = sae.encode(x)
                error = x - sae.decode(f)
                f = f.clone()
                f[..., feature.index] = torch.where(
                    scored, sae.encode(patched[feature.layer])[..., feature.index], f[..., feature.index]
                )
                return sae.decode(f) + error

            with torch.inference_mode(), hooked(model.layers, {feature.layer: dense}):
                logits = model.last_logits(batch)
            effect = float(logits[0, target] - logits[0, list(METRIC.refusal_ids)].logsumexp(0)) - before
            assert found.rows[row].totals[column] == pytest.approx(effect, abs=2e-5)
        assert found.rows[row].clean == pytest.approx(before, abs=1e-5)
        assert found.rows[row].patched == pytest.approx(after, abs=1e-5)
        assert found.rows[row].explained == pytest.approx(sum(found.rows[row].totals), abs=1e-5)
        del clean


def test_path_attributions_of_everything_add_up(model: ChatModel, suite: Suite, patch: Compiled) -> None:
    """Features and error terms of all layers and tokens, written out densely here, sum to the metric's whole change."""
    coarse, fine = (run(model, suite, patch, method="ig", steps=steps) for steps in (4, 64))
    assert float(fine.gaps.abs().max()) < 2e-3 * float(fine.changes.abs().max())
    assert float(fine.gaps.abs().max()) < float(coarse.gaps.abs().max())
    text, steps = TEXTS[0], 64
    batch, _, patched, target, before, after = ends(model, patch, text)
    total_features, total_errors = 0.0, 0.0
    for step in range(steps):
        alpha, entered, left = (step + 0.5) / steps, {}, {}

        def mix(layer: int, alpha: float = alpha, entered: Any = entered, left: Any = left) -> Any:
            def go(x: Tensor) -> Tensor:
                entered[layer] = x.detach()
                y = (1 - alpha) * x + alpha * patched[layer]
                left[layer] = y if y.requires_grad else y.requires_grad_()
                return left[layer]

            return go

        with hooked(model.layers, {layer: mix(layer) for layer in range(model.n_layers)}):
            logits = model.last_logits(batch)
        value = logits[0, target] - logits[0, list(METRIC.refusal_ids)].logsumexp(0)
        gradients = torch.autograd.grad(value, [left[layer] for layer in range(model.n_layers)])
        for layer, gradient in enumerate(gradients):
            sae = suite[layer].dense()
            change = sae.encode(patched[layer]) - sae.encode(entered[layer])
            error = (patched[layer] - sae.decode(sae.encode(patched[layer]))) - (
                entered[layer] - sae.decode(sae.encode(entered[layer]))
            )
            total_features += float((change * (gradient @ sae.w_dec.T)).sum()) / steps
            total_errors += float((error * gradient).sum()) / steps
    assert total_features + total_errors == pytest.approx(after - before, rel=5e-3)
    assert fine.rows[0].explained == pytest.approx(total_features + total_errors, rel=1e-3)


def test_pool_values_on_the_path(model: ChatModel, suite: Suite, patch: Compiled) -> None:
    """Attributing every feature gives, for the pool's features, what attributing the pool gives."""
    everything = {layer: range(D_SAE) for layer in suite.layers}
    for method in ("ig", "paper", "gradient"):
        whole = run(model, suite, patch, method=method, pool=everything, steps=3)
        pool = run(model, suite, patch, method=method, steps=3)
        columns = [whole.features.index(feature) for feature in FEATURES]
        torch.testing.assert_close(whole.totals[:, columns], pool.totals, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(whole.gaps, pool.gaps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["gradient", "ig", "paper", "exact"])
def test_batches_do_not_matter(model: ChatModel, suite: Suite, patch: Compiled, method: Method) -> None:
    """Neither how prompts are batched nor how many alphas run at once changes a value; order is restored."""
    together = run(model, suite, patch, method=method, steps=3)
    assert [row.prompt_id for row in together.rows] == IDS
    plain = model.budgets
    try:
        model.budgets = Budgets(40, 40)
        apart = run(model, suite, patch, method=method, steps=3)
        model.budgets = Budgets(4000, 4000)
        alone = Attribution.joined([run_one(model, suite, patch, n, method) for n in range(len(TEXTS))])
    finally:
        model.budgets = plain
    torch.testing.assert_close(apart.totals, together.totals, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(alone.totals, together.totals, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(alone.gaps, together.gaps, rtol=1e-3, atol=1e-4)


def run_one(model: ChatModel, suite: Suite, patch: Compiled, n: int, method: Method) -> Attribution:
    items = model.tokenize([Prompt(id=IDS[n], text=TEXTS[n])])
    return attribute(model, suite, items, POOL, patch=patch, metric=METRIC, method=method, steps=3)


@pytest.mark.parametrize(
    ("method", "tokens", "rows"),
    [
        # As many copies of the prompt at a pass as fit in the tokens that are planned for, on a CPU 256 at most. The
        # paper's path begins with the clean run, which goes alone.
        ("ig", 3, [3, 3, 2]),
        ("ig", 3.9, [3, 3, 2]),
        ("ig", 8, [8]),
        ("ig", 0.5, [1] * 8),
        ("paper", 3, [1, 3, 3, 1]),
        ("gradient", 3, [1]),
        ("ig", 1000, [256 // 17, 24 - 256 // 17]),
    ],
)
def test_steps_are_taken_together_as_far_as_memory_is_planned_for(
    model: ChatModel, patch: Compiled, method: Method, tokens: float, rows: list[int]
) -> None:
    (item,) = model.tokenize(TEXTS[1:2])
    item = TokenizedPrompt("0", (*item.ids, *[9] * 17)[:17], (*item.regions, *[Region.INSTRUCTION] * 17)[:17])
    batch, how = model.batch([item]), estimator(method, 24 if tokens == 1000 else 8)
    plain, model.budgets = model.budgets, Budgets(int(17 * tokens), int(17 * tokens))
    passes: list[int] = []
    visited: list[tuple[int, int]] = []

    def visit(layer: int, entered: Tensor, read: Tensor, gradient: Tensor) -> None:
        assert entered.shape == read.shape == gradient.shape == (len(entered), 1, 17, model.d_model)
        visited.append((layer, len(entered)))

    try:
        ends = run_ends(model, batch, patch, METRIC, how)
        with hooked(model.layers, {0: lambda x: passes.append(len(x))}):
            run_path(model, batch, ends, METRIC, how, visit)
    finally:
        model.budgets = plain
    assert passes == rows
    assert visited == [(layer, n) for n in rows for layer in reversed(range(model.n_layers))]


@pytest.mark.parametrize(("prompts", "at_once"), [(0.5, 1), (2.9, 2), (1000, 1000)])
def test_exact_patching_runs_only_features_that_move_as_many_at_once_as_fit(
    model: ChatModel, suite: Suite, patch: Compiled, prompts: float, at_once: int
) -> None:
    items = model.tokenize(TEXTS[1:2])
    pool = {layer: range(D_SAE) for layer in suite.layers}
    batch, clean, patched, *_ = ends(model, patch, TEXTS[1])
    scored = ScoredTokens().mask(batch)[0]
    moving: list[FeatureId] = []
    for layer in suite.layers:
        before, after = (suite[layer].dense().encode(each[layer])[0, scored] for each in (clean, patched))
        moving += [FeatureId(layer, n) for n in (before != after).any(0).nonzero()[:, 0].tolist()]
    assert 5 < len(moving) < 4 * D_SAE
    plain = model.budgets
    model.budgets = Budgets(int(prompts * len(items[0])), 1)
    passes: list[int] = []
    try:
        with hooked(model.layers, {0: lambda x: passes.append(len(x))}):
            found = attribute(model, suite, items, pool, patch=patch, metric=METRIC, method="exact")
    finally:
        model.budgets = plain
    whole, rest = divmod(len(moving), at_once)
    assert passes == [1, 1, *[at_once] * whole, *[rest] * bool(rest)]
    assert {f for f, effect in zip(found.features, found.rows[0].totals, strict=True) if effect} <= {*moving}


def test_only_scored_tokens_count(model: ChatModel, suite: Suite, patch: Compiled) -> None:
    found = run(model, suite, patch, method="gradient", keep_positions=True)
    skipping = run(model, suite, patch, method="gradient", keep_positions=True, scoring=ScoredTokens(header_tokens=2))
    assert found.by_position is not None
    for n, item in enumerate(model.tokenize(TEXTS)):
        regions = torch.tensor(item.regions)
        inside = (regions == Region.INSTRUCTION) | (regions == Region.POST_INSTRUCTION)
        values = found.by_position[n].double()
        assert values.shape == (len(item), len(FEATURES))
        torch.testing.assert_close(found.totals[n], values[inside].sum(0), rtol=1e-4, atol=1e-6)
        assert found.rows[n].n_scored == int(inside.sum()) < len(item)
        torch.testing.assert_close(skipping.totals[n], values[2:].sum(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(skipping.means[n], values[2:].mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "method", "d_sae"),
    [
        ("jumprelu", "gradient", 8200),
        ("jumprelu", "paper", D_SAE),
        ("jumprelu", "ig", 8200),
        ("topk", "gradient", D_SAE),
        ("topk", "ig", D_SAE),
    ],
)
def test_the_whole_dictionary_streamed_equals_the_pool_of_everything(
    model: ChatModel, activation: ActivationName, patch: Compiled, method: Method, d_sae: int
) -> None:
    """Also where the dictionary is encoded in several blocks."""
    suite = tiny_suite(model.hf, d_sae=d_sae, activation=activation)
    everything = {layer: range(d_sae) for layer in suite.layers}
    whole = run(model, suite, patch, method=method, pool=everything, steps=3)
    plain = model.budgets
    try:
        if d_sae == D_SAE:
            model.budgets = Budgets(40, 40)  # several batches, whose sums have to add up
        found = attribute_dictionary(
            model, suite, model.tokenize(TEXTS), patch=patch, metric=METRIC, top=6, method=method, steps=3
        )
    finally:
        model.budgets = plain
    values, places = whole.means.mean(0).topk(6)
    assert found.overall.features == tuple(whole.features[int(n)] for n in places)
    assert found.overall.scores == pytest.approx(values.tolist(), rel=1e-3)
    for n, local in enumerate(found.local):
        values, places = whole.means[n].topk(6)
        assert local.prompt_id == IDS[n]
        assert local.features == tuple(whole.features[int(m)] for m in places)
        assert local.scores == pytest.approx(values.tolist(), rel=1e-3, abs=1e-7)


def test_falling_counts_only_tokens_at_which_the_feature_is_lower_in_the_patched_run(
    model: ChatModel, suite: Suite, patch: Compiled
) -> None:
    everything = {layer: range(D_SAE) for layer in suite.layers}
    whole = run(model, suite, patch, method="gradient", pool=everything, keep_positions=True)
    assert whole.by_position is not None
    found = attribute_dictionary(
        model, suite, model.tokenize(TEXTS), patch=patch, metric=METRIC, top=5, method="gradient", falling=True
    )
    changed = 0
    for n, text in enumerate(TEXTS):
        batch, clean, patched, *_ = ends(model, patch, text)
        lower = torch.cat(
            [
                suite[layer].dense().encode(patched[layer])[0] < suite[layer].dense().encode(clean[layer])[0]
                for layer in suite.layers
            ],
            -1,
        )
        scored = ScoredTokens().mask(batch)[0]
        means = (whole.by_position[n] * lower)[scored].sum(0) / scored.sum()
        values, places = means.topk(5)
        assert found.local[n].features == tuple(whole.features[int(m)] for m in places)
        assert found.local[n].scores == pytest.approx(values.tolist(), rel=1e-3, abs=1e-7)
        changed += int(not torch.allclose(means, whole.means[n].float(), atol=1e-6))
    assert changed == len(TEXTS)


def test_attribution_to_zero_is_the_derivative_by_the_features_scale(
    model: ChatModel, suite: Suite, patch: Compiled
) -> None:
    """Scaling a feature by 1 − ε, on the prompt's own words alone, moves the metric by ε times it."""
    words = ScoredTokens(regions=(Region.INSTRUCTION,))
    found = attribute_dictionary(
        model, suite, model.tokenize(TEXTS), patch=patch, metric=METRIC, top=5, to_zero=True, scoring=words
    )
    step = 1e-2
    for n, text in enumerate(TEXTS):
        batch, clean, _, target, _, _ = ends(model, patch, text)
        own = words.mask(batch)[0]
        for feature, score in zip(found.local[n].features, found.local[n].scores, strict=True):
            values = suite[feature.layer].dense().encode(clean[feature.layer])[:, :, feature.index]
            row = suite[feature.layer].dense().w_dec[feature.index]
            ways: list[float] = []
            for sign in (1, -1):
                change = -sign * step * (values * own)[..., None] * row
                with (
                    torch.inference_mode(),
                    hooked(model.layers, {feature.layer: lambda x, change=change: x + change}),
                ):
                    logits = model.last_logits(batch)[0].double()
                ways.append(float(logits[target] - logits[list(METRIC.refusal_ids)].logsumexp(0)))
            assert score * int(own.sum()) == pytest.approx((ways[0] - ways[1]) / (2 * step), rel=0.02, abs=1e-5)


@pytest.mark.parametrize("method", ["gradient", "ig", "paper", "exact"])
def test_a_patched_run_that_is_the_clean_run_carries_no_signal(model: ChatModel, suite: Suite, method: Method) -> None:
    nothing = Compiled(model, None, [])
    found = run(model, suite, nothing, method=method)
    assert not found.signal.any()
    assert found.share_without_signal == 1.0
    if method != "exact":
        with pytest.raises(ModelError, match="nothing to rank"):
            attribute_dictionary(
                model, suite, model.tokenize(TEXTS), patch=nothing, metric=METRIC, top=5, method=method
            )


def test_under_the_papers_target_rule_a_run_that_still_refuses_carries_no_signal(
    model: ChatModel, suite: Suite, patch: Compiled
) -> None:
    targets: list[int] = []
    for text in TEXTS:
        batch = model.batch(model.tokenize([text]))
        with torch.inference_mode(), patch.on(batch):
            targets.append(int(model.last_logits(batch)[0].argmax()))
    refusing = Metric((targets[0],), allow_refusal_target=True)
    found = run(model, suite, patch, method="paper", metric=refusing)
    assert found.signal.tolist() == [target != targets[0] for target in targets]
    assert not any(found.rows[0].totals)
    # Aimed at the likeliest other token, the same prompt carries signal.
    assert run(model, suite, patch, method="paper", metric=Metric((targets[0],))).signal.all()


def test_parameters_keep_no_gradient_and_no_hook_stays(model: ChatModel, suite: Suite, patch: Compiled) -> None:
    run(model, suite, patch, method="ig", steps=2)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.hf.parameters())
    assert count_hooks(model.hf) == 0
    assert torch.is_grad_enabled()


def test_a_batch_that_is_done_is_left_out(model: ChatModel, suite: Suite, patch: Compiled) -> None:
    plain, model.budgets = model.budgets, Budgets(30, 30)
    try:
        options: dict[str, Any] = {"patch": patch, "metric": METRIC, "method": "gradient"}
        items = model.tokenize(TEXTS)
        parts = list(attribute_batches(model, suite, items, POOL, **options))
        assert len(parts) > 2
        first = {row.prompt_id for row in parts[0].rows}
        rest = list(attribute_batches(model, suite, items, POOL, take=lambda keys: not first >= set(keys), **options))
    finally:
        model.budgets = plain
    assert [part.rows for part in rest] == [part.rows for part in parts[1:]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_patching_is_exact_in_half_precision_too(suite: Suite, dtype: torch.dtype) -> None:
    """Stored weights are rounded; the passes are not, and afterwards the model is what it was."""
    hf, tokenizer = tiny_model("gemma2")
    model = ChatModel(cast("Any", hf).to(dtype), tokenizer, name="half")
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3))
    patch = Compiled(model, None, [AblateDirection(vector)])
    before = {name: values.clone() for name, values in hf.state_dict().items()}
    found = run(model, suite, patch, method="exact").totals
    assert {values.dtype for values in hf.parameters()} == {dtype}
    assert all(torch.equal(values, before[name]) for name, values in hf.state_dict().items())
    widened = ChatModel(hf.float(), tokenizer, name="wide")
    expected = run(widened, suite, Compiled(widened, None, [AblateDirection(vector)]), method="exact").totals
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_progress_counts_prompts(model: ChatModel, suite: Suite, patch: Compiled) -> None:
    told: list[tuple[int, int]] = []
    plain, model.budgets = model.budgets, Budgets(1, 1)
    try:
        run(model, suite, patch, method="gradient", progress=lambda *each: told.append(each))
        assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
        told.clear()
        options: dict[str, Any] = {"patch": patch, "metric": METRIC, "top": 2}
        attribute_dictionary(model, suite, model.tokenize(TEXTS), progress=lambda *each: told.append(each), **options)
    finally:
        model.budgets = plain
    assert told[-1] == (4, 4)


@pytest.mark.parametrize(("method", "steps"), [("gradient", 1), ("exact", 1), ("ig", 7), ("paper", 7)])
def test_what_was_asked_is_kept_and_steps_count_only_where_there_are_several(
    model: ChatModel, suite: Suite, patch: Compiled, method: Method, steps: int
) -> None:
    scoring = ScoredTokens(2, (Region.INSTRUCTION,))
    metric = Metric((11,), allow_refusal_target=True)
    found = run(model, suite, patch, n=1, method=method, steps=7, metric=metric, scoring=scoring, pool={3: (2,), 1: ()})
    assert found.spec == AttributionSpec(
        method=method,
        steps=steps,
        refusal_ids=(11,),
        allow_refusal_target=True,
        header_tokens=2,
        regions=(Region.INSTRUCTION,),
        patch=patch.id,
    )
    assert (found.method, found.steps, found.features) == (method, steps, (FeatureId(3, 2),))


def test_what_is_done_unless_something_is_said(model: ChatModel, suite: Suite, patch: Compiled) -> None:
    assert estimator("ig") == estimator("ig", 10)
    assert Metric((1,)) == Metric((1,), allow_refusal_target=False)
    found = run(model, suite, patch, n=1)
    assert (found.method, found.steps, found.by_position) == ("ig", 10, None)
    options: dict[str, Any] = {"patch": patch, "metric": METRIC, "top": 3}
    items = model.tokenize(TEXTS[:2])
    plain = attribute_dictionary(model, suite, items, **options)
    known = attribute_dictionary(model, suite, items, method="gradient", falling=False, to_zero=False, **options)
    assert plain == known
    assert plain.overall.method == plain.local[0].method == "dictionary+gradient"
    assert (plain.overall.scope, plain.overall.prompt_id) == ("global", None)
    assert [(each.scope, each.prompt_id) for each in plain.local] == [("local", "0"), ("local", "1")]
    ten = attribute_dictionary(model, suite, items, method="ig", **options)
    assert ten == attribute_dictionary(model, suite, items, method="ig", steps=10, **options)


def test_a_pool_is_ordered_by_layer_and_knows_its_cosines() -> None:
    pool = Pool(features=(FeatureId(3, 9), FeatureId(0, 4), FeatureId(3, 1)), cosines=(0.9, 0.5, -0.2))
    assert (
        pool_features(pool)
        == pool_features({3: (9, 1), 0: (4,)})
        == (
            FeatureId(0, 4),
            FeatureId(3, 9),
            FeatureId(3, 1),
        )
    )
    assert [pool.cosine(feature) for feature in pool.features] == [0.9, 0.5, -0.2]


def test_no_prompts_have_no_share_of_signal_and_no_rows() -> None:
    question = AttributionSpec.of("ig", 10, Metric((7,)), ScoredTokens(), "none")
    nothing = Attribution((FeatureId(0, 1), FeatureId(0, 2)), question, ())
    assert nothing.totals.shape == nothing.means.shape == (0, 2)
    assert math.isnan(nothing.share_without_signal)


def test_parts_are_joined_and_ordered_with_what_is_kept_of_their_tokens() -> None:
    question = AttributionSpec.of("gradient", 1, Metric((7,)), ScoredTokens(), "none")

    def part(*names: str, kept: bool) -> Attribution:
        rows = tuple(
            PromptAttribution(prompt_id=p, target=3, clean=0.0, patched=1.0, explained=1.0, n_scored=0, totals=(2.0,))
            for p in names
        )
        tokens = tuple(torch.full((ord(p) - 96, 1), 0.5) for p in names)
        return Attribution((FeatureId(0, 1),), question, rows, tokens if kept else None)

    found = Attribution.joined([part("c", "a", kept=True), part("b", kept=True)]).ordered(["a", "b", "c"])
    assert [row.prompt_id for row in found.rows] == ["a", "b", "c"]
    assert [len(each) for each in found.by_position or ()] == [1, 2, 3]
    assert Attribution.joined([part("b", kept=False), part("a", kept=False)]).ordered(["a", "b"]).by_position is None
    # A prompt without a scored token has the mean of nothing, not an infinite one.
    assert found.means.tolist() == [[2.0]] * 3


def test_round_trip() -> None:
    rows = tuple(
        PromptAttribution(prompt_id=p, target=3, clean=-1.5, patched=0.1, explained=1.4, n_scored=4, totals=(0.1, -0.3))
        for p in ("a", "b")
    )
    question = AttributionSpec.of("ig", 10, Metric((7,)), ScoredTokens(1), "ablate@1")
    found = Attribution((FeatureId(1, 2), FeatureId(3, 4)), question, rows)
    assert Attribution.from_parts(*found.to_parts()) == found
    kept = Attribution(found.features, question, rows, (torch.ones(3, 2), torch.zeros(4, 2)))
    again = Attribution.from_parts(*kept.to_parts())
    assert again.by_position is not None
    assert all(torch.equal(a, b) for a, b in zip(again.by_position, kept.by_position or (), strict=True))
    assert found.gaps.tolist() == pytest.approx([0.2, 0.2])
    assert found.means.tolist() == [[0.025, -0.075]] * 2


def test_what_cannot_be_asked(model: ChatModel, patch: Compiled, suite: Suite) -> None:
    with pytest.raises(InputError, match="'exact' is not an estimate; expected gradient, ig or paper"):
        estimator("exact")
    with pytest.raises(InputError, match="the pool holds no feature"):
        run(model, suite, patch, pool={1: ()})
    with pytest.raises(InputError, match="no values by position"):
        run(model, suite, patch, method="exact", keep_positions=True)


def test_topk_suites_can_be_attributed(model: ChatModel, patch: Compiled) -> None:
    suite = tiny_suite(model.hf, d_sae=D_SAE, activation="topk")
    found = run(model, suite, patch, method="gradient")
    assert found.totals.abs().sum() > 0
    text = TEXTS[0]
    _, clean, patched, *_ = ends(model, patch, text)
    still = [
        n
        for n, feature in enumerate(FEATURES)
        if torch.equal(
            suite[feature.layer].dense().encode(clean[feature.layer])[..., feature.index],
            suite[feature.layer].dense().encode(patched[feature.layer])[..., feature.index],
        )
    ]
    assert still
    assert all(found.rows[0].totals[n] == 0 for n in still)
