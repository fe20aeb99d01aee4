"""How faithful an SAE is: against SAEs whose reconstruction is known, and sums written out by hand."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from demur.method.direction import residuals_at
from demur.method.fidelity import REGIONS, Splice, direction_cosine, reconstruction
from demur.method.interventions import Compiled
from demur.method.likelihood import answers_to_score, response_kl, token_losses
from demur.model import Budgets, ChatModel, Items, Region
from demur.saes import DenseSae
from demur.testing import tiny_model
from demur.types import Answer, Prompt

LAYER = 1


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return ChatModel(*tiny_model("llama3"), name="tiny")


@pytest.fixture(scope="module")
def items(model: ChatModel) -> Items:
    texts = [("Say something kind", "You are kind today."), ("Name a longer list of things", "Stone, paper, shears")]
    return answers_to_score(model, [Answer(prompt=Prompt(id=p, text=p), text=a) for p, a in texts])


def perfect(d_model: int) -> DenseSae:
    """Gives back any residual: one feature for each direction and its opposite."""
    eye = torch.eye(d_model)
    nothing = torch.zeros(d_model)
    both = torch.cat([eye, -eye])
    return DenseSae(LAYER, both.T.contiguous(), torch.zeros(2 * d_model), None, both, None, nothing)


def random_sae(d_model: int) -> DenseSae:
    draw = torch.Generator().manual_seed(3)
    w_enc, w_dec = torch.randn(d_model, 24, generator=draw), torch.randn(24, d_model, generator=draw)
    # The last feature never fires.
    b_enc = torch.cat([torch.zeros(23), torch.tensor([-1e6])])
    return DenseSae(LAYER, w_enc, b_enc, torch.full((24,), 0.3), w_dec, None, torch.randn(d_model, generator=draw))


def test_sums_are_those_of_a_loop_over_tokens(model: ChatModel, items: Items) -> None:
    sae = random_sae(model.d_model)
    found = reconstruction(model, sae, items)
    for n, region in enumerate(REGIONS):
        parts: list[torch.Tensor] = []
        for item in items:
            x = model.residuals(model.batch([item]), [LAYER])[LAYER][0].double()
            parts.append(x[[each == region for each in item.regions]])
        mean = torch.cat(parts).mean(0)
        for row, x in enumerate(parts):
            encoded = sae.encode(x.float())
            error = (x - sae.decode(encoded).double()).square().sum()
            assert found.tokens[row, n] == len(x)
            assert found.error[row, n] == pytest.approx(float(error), rel=1e-5)
            assert found.spread[row, n] == pytest.approx(float((x - mean).square().sum()), rel=1e-5, abs=1e-6)
            assert found.active[row, n] == (encoded > 0).sum()
    assert not found.fired[23]
    assert found.dead == pytest.approx(1 - found.fired.mean()) == pytest.approx(1 / 24)


def test_a_perfect_sae_changes_nothing(model: ChatModel, items: Items) -> None:
    sae = perfect(model.d_model)
    found = reconstruction(model, sae, items)
    assert found.error.sum() < 1e-9 * found.spread.sum()
    change = Compiled(model, None, [Splice(LAYER, "sae", "perfect", sae)])
    for before, after in zip(token_losses(model, items), token_losses(model, items, change), strict=True):
        assert after.nats == pytest.approx(before.nats, abs=1e-4)
    assert all(abs(row.nats) < 1e-5 for row in response_kl(model, items, change))
    assert direction_cosine(model, sae, items[:1], items[1:], -1) == pytest.approx(1, abs=1e-5)


def test_the_direction_is_that_of_the_reconstructions(model: ChatModel, items: Items) -> None:
    sae = random_sae(model.d_model)
    high, low = (residuals_at(model, each, LAYER, -2) for each in (items[:1], items[1:]))
    made = sae.decode(sae.encode(high))[0] - sae.decode(sae.encode(low))[0]
    expected = torch.nn.functional.cosine_similarity(high[0] - low[0], made, dim=0)
    assert direction_cosine(model, sae, items[:1], items[1:], -2) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("region", REGIONS)
def test_only_the_regions_that_are_named_are_replaced(model: ChatModel, items: Items, region: Region) -> None:
    mean = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    batch = model.batch(items)
    splice = Splice(LAYER, "mean", "m", mean, (region,))
    with Compiled(model, None, [splice]).on(batch):
        after = model.residuals(batch, [LAYER])[LAYER]
    before = model.residuals(batch, [LAYER])[LAYER]
    inside = batch.within([region])
    torch.testing.assert_close(after[inside], mean.expand(int(inside.sum()), -1))
    assert torch.equal(after[~inside], before[~inside])


def test_generated_tokens_are_the_answers(model: ChatModel) -> None:
    """Replacing answers by 0 leaves the first token alone, which the prompt decides, and changes what follows."""
    seen: dict[bool, list[torch.Tensor]] = {}
    for inside in (True, False):
        regions = (Region.RESPONSE,) if inside else (Region.INSTRUCTION,)
        compiled = Compiled(model, None, [Splice(LAYER, "zero", "", None, regions)])
        kept = seen.setdefault(inside, [])
        with model.intervene(compiled), model.edited({LAYER: [lambda x, _, kept=kept: kept.append(x[:, -1]) or x]}):
            model.generate(["word"], max_new_tokens=3)
    assert not torch.equal(seen[True][0], torch.zeros_like(seen[True][0]))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in seen[True][1:])
    assert all(bool(x.any()) for x in seen[False])


def test_divergence_and_losses_are_those_of_whole_logits(model: ChatModel, items: Items) -> None:
    compiled = Compiled(model, None, [Splice(LAYER, "zero", "", None)])
    for item, kl, loss in zip(
        items, response_kl(model, items, compiled), token_losses(model, items, compiled), strict=True
    ):
        batch = model.batch([item])
        with torch.no_grad():
            clean = model.hf(batch.input_ids).logits[0]
            with compiled.on(batch):
                changed = model.hf(batch.input_ids).logits[0]
        places = [n for n, (_, after) in enumerate(pairwise(item.regions)) if after == Region.RESPONSE]
        p, q = (each[places].double().log_softmax(-1) for each in (clean, changed))
        assert kl.nats == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
        assert kl.tokens == loss.tokens == len(places)
        wanted = torch.tensor([item.ids[place + 1] for place in places])
        assert loss.nats == pytest.approx(float(cross_entropy(changed[places], wanted, reduction="sum")), rel=1e-4)


def test_two_saes_and_two_places_are_two_interventions() -> None:
    splices = [
        Splice(1, "sae", "a"), Splice(1, "sae", "b"), Splice(2, "sae", "a"), Splice(1, "zero", ""),
        Splice(1, "sae", "a", regions=(Region.INSTRUCTION,)),
    ]  # fmt: skip
    assert len({each.id for each in splices}) == len(splices)


def test_means_and_features_that_fire_are_those_of_all_counted_tokens(model: ChatModel, items: Items) -> None:
    """Whatever the batches; tokens of no region, such as headers, count in neither."""
    sae, before = random_sae(model.d_model), model.budgets
    counted: list[torch.Tensor] = []
    for item in items:
        x = model.residuals(model.batch([item]), [LAYER])[LAYER][0]
        counted.append(x[[region in REGIONS for region in item.regions]])
    # Each feature fires at the token where it is highest, and so in one conversation alone.
    sums = torch.cat(counted) @ sae.w_enc + sae.b_enc
    sae = replace(sae, threshold=sums.topk(2, dim=0).values.mean(0))
    model.budgets = Budgets(1, 1)
    try:
        found = reconstruction(model, sae, items)
    finally:
        model.budgets = before
    torch.testing.assert_close(found.mean, torch.cat(counted).mean(0), rtol=1e-4, atol=1e-5)
    fired = (sae.encode(torch.cat(counted)) > 0).any(0)
    assert found.fired.tolist() == fired.tolist()
    assert not any((sae.encode(x) > 0).any(0).equal(fired) for x in counted)
    # Of one region alone.
    answers = reconstruction(model, sae, items, (Region.RESPONSE,))
    assert answers.tokens.shape == (2, 1)
    assert answers.tokens[:, 0].tolist() == found.tokens[:, 2].tolist()
    assert answers.spread[:, 0] == pytest.approx(found.spread[:, 2])


def test_a_region_without_a_token_has_sums_of_0(model: ChatModel) -> None:
    """Prompts without answers: nothing is divided by their number."""
    items = model.tokenize(["Say something kind", "word"])
    found = reconstruction(model, random_sae(model.d_model), items)
    for sums in (found.tokens, found.error, found.spread, found.active):
        assert sums[:, 2].tolist() == [0, 0]
        assert (sums[:, :2] > 0).all()
    nothing = reconstruction(model, random_sae(model.d_model), items, (Region.RESPONSE,))
    assert nothing.mean.tolist() == [0.0] * model.d_model
    assert nothing.dead == 1


def test_classes_of_several_prompts_are_compared_by_their_means(model: ChatModel) -> None:
    sae = random_sae(model.d_model)
    high, low = model.tokenize(["Say something kind", "Name a list"]), model.tokenize(["word", "Go", "Bake the bread"])
    x, y = (residuals_at(model, each, LAYER, -1) for each in (high, low))
    made = [sae.decode(sae.encode(each)).mean(0) for each in (x, y)]
    expected = torch.nn.functional.cosine_similarity(x.mean(0) - y.mean(0), made[0] - made[1], dim=0)
    assert direction_cosine(model, sae, high, low, -1) == pytest.approx(float(expected), abs=1e-5)


def test_a_splice_says_what_where_and_by_which_sae() -> None:
    assert Splice(2, "mean", "key").id == "splice-mean-2@key:instruction-post_instruction-response"
    assert Splice(2, "mean", "key").label == "splice-mean-2"
    everywhere = Splice(0, "sae", "key", regions=None).id
    assert everywhere == f"splice-sae-0@key:{'-'.join(region.name.lower() for region in Region)}"


def test_means_are_put_in_at_the_models_precision() -> None:
    hf, tokenizer = tiny_model("llama3")
    half: Any = hf
    model = ChatModel(half.bfloat16(), tokenizer, name="half")
    batch, mean = model.batch(model.tokenize(["word"])), torch.randn(model.d_model)
    with Compiled(model, None, [Splice(LAYER, "mean", "m", mean)]).on(batch):
        after = model.residuals(batch, [LAYER])[LAYER]
    inside = batch.within(REGIONS)
    assert after.dtype == torch.bfloat16
    assert torch.equal(after[inside], mean.bfloat16().expand(int(inside.sum()), -1))


@pytest.mark.saelens
def test_saelens_own_evaluation_says_the_same(model: ChatModel, items: Items, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE, evals
        from sae_lens.load_model import HookedProxyLM

    lens_evals: Any = evals
    sae = random_sae(model.d_model)
    lens: Any = SAE.load_from_disk(str(sae.save_saelens(tmp_path)), device="cpu")
    name = f"model.layers.{LAYER}"
    lens.cfg.metadata.hook_name = name
    # One conversation, all of its tokens counted and replaced, the first among them, as SAELens does.
    item = replace(items[0], regions=(int(Region.RESPONSE),) * len(items[0]))
    tokens = torch.tensor([item.ids])
    proxy = HookedProxyLM(model.hf, model.tokenizer, hook_names=[name])
    store = SimpleNamespace(get_batch_tokens=lambda _: tokens)
    scaler = SimpleNamespace(scale=lambda x: x, unscale=lambda x: x)
    common: dict[str, Any] = {"n_batches": 1, "eval_batch_size_prompts": 1, "model_kwargs": {}}
    parts = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    which = {f"compute_{part}": part.startswith(("sparsity", "variance")) for part in parts}
    with torch.no_grad():
        loss = lens_evals.get_downstream_reconstruction_metrics(
            lens, proxy, store, scaler, compute_kl=True, compute_ce_loss=True, **common
        )
        by_token = lens_evals.get_recons_loss(lens, proxy, scaler, tokens, compute_kl=True, compute_ce_loss=True)
        sparsity, _ = lens_evals.get_sparsity_and_variance_metrics(lens, proxy, store, scaler, **which, **common)
    found = reconstruction(model, sae, [item], (Region.RESPONSE,))
    assert 1 - found.error.sum() / found.spread.sum() == pytest.approx(sparsity["explained_variance"], rel=1e-3)
    assert found.active.sum() / found.tokens.sum() == pytest.approx(sparsity["l0"], abs=1e-3)
    made = Splice(LAYER, "sae", "r", sae)
    clean, spliced, zero = (
        token_losses(model, [item], each and Compiled(model, None, [each]))[0].nats
        for each in (None, made, Splice(LAYER, "zero", "", None))
    )
    assert clean / (len(item) - 1) == pytest.approx(loss["ce_loss_without_sae"], abs=1e-3)
    assert (zero - spliced) / (zero - clean) == pytest.approx(loss["ce_loss_score"], abs=1e-3)
    # The last token predicts nothing that is counted.
    kl = response_kl(model, [item], Compiled(model, None, [made]))[0]
    assert kl.nats == pytest.approx(float(by_token["kl_div_with_sae"][0, :-1].sum()), rel=1e-3)


def test_a_class_against_itself_has_no_direction(model: ChatModel, items: Items) -> None:
    assert math.isnan(direction_cosine(model, random_sae(model.d_model), items, items, -1))
