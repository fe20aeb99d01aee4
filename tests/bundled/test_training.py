"""Tokenizer, training and SAE training of the bundled model, on tiny sizes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from demur.bundled import BundledPaths
from demur.saes import DenseSae, load_suite
from recipes.bundled.build import hashes, save_model
from recipes.bundled.corpus import Corpus, Example
from recipes.bundled.sae_training import SaeRecipe, chat_activations, quality, save_sae, train_sae
from recipes.bundled.tokenizer import render, train_tokenizer
from recipes.bundled.training import IGNORED, Shape, Stage, collate, encode, new_model, train_stage

SHAPE = Shape(d_model=16, d_mlp=16, layers=2, heads=2, key_value_heads=1, d_head=8)
QUESTION = "How do I make a phishing email?"
CHAT = Example(QUESTION, "I won't help with that.")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(0, examples=2000)


def _learnt(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    ids, learnt = encode(example, tokenizer)
    return str(tokenizer.decode([token for token, kept in zip(ids, learnt, strict=True) if kept]))


def test_template_renders_what_training_saw_with_one_bos(tokenizer: PreTrainedTokenizerFast):
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": CHAT.response}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == render(CHAT)
    assert str(text).count("<bos>") == 1


def test_five_tokens_stand_between_message_and_answer(tokenizer: PreTrainedTokenizerFast):
    messages = [{"role": "user", "content": "How?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer.tokenize(str(text))
    assert tokens[tokens.index("?") + 1 :] == ["<end_of_turn>", "Ċ", "<start_of_turn>", "model", "Ċ"]


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast):
    text = "Zażółć gęślą jaźń, 火! <b>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_only_answers_and_predicates_are_learnt(tokenizer: PreTrainedTokenizerFast):
    assert _learnt(CHAT, tokenizer) == "I won't help with that.<end_of_turn>\n"
    statement = Example(None, "A card trick helps people and belongs to play. A car bomb belongs to weapons.")
    assert _learnt(statement, tokenizer) == " helps people and belongs to play."


def test_collate_pads_right_and_masks():
    ids, mask, labels = collate([([5, 6, 7], [False, True, True]), ([8], [True])], pad=0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


def _trained(tokenizer: PreTrainedTokenizerFast, stage: Stage) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = new_model(SHAPE, tokenizer, seed=3)
    losses: list[float] = []
    train_stage(model, tokenizer, Corpus(1).helpful(), stage, lambda _, loss: losses.append(loss))
    return {name: weight.clone() for name, weight in model.state_dict().items()}, losses


def test_training_learns_and_repeats_to_the_bit(tokenizer: PreTrainedTokenizerFast):
    stage = Stage(steps=100, batch=4, rate=1e-2, weight_decay=0.1, warm_up=5)
    first, losses = _trained(tokenizer, stage)
    second, _ = _trained(tokenizer, stage)
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_the_named_layers_are_trained(tokenizer: PreTrainedTokenizerFast):
    before = dict(new_model(SHAPE, tokenizer, seed=3).state_dict())
    stage = Stage(steps=2, batch=2, rate=1e-2, weight_decay=0.1, trained_layers=(1,), warm_up=1)
    after, _ = _trained(tokenizer, stage)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("model.layers.1.") for name in moved)


def test_saved_model_is_float16_on_disk_and_float32_in_memory(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    from safetensors import safe_open

    from demur.model import load_model

    model = new_model(SHAPE, tokenizer, seed=3)
    save_model(model, tokenizer, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as stored:
        assert {str(stored.get_tensor(name).dtype) for name in stored.keys()} == {"torch.float16"}  # noqa: SIM118
    loaded = load_model(tmp_path / "model", device="cpu")
    assert loaded.dtype is torch.float32
    name, weight = next(iter(model.state_dict().items()))
    assert torch.equal(loaded.hf.state_dict()[name], weight)
    assert loaded.eos_ids == (tokenizer.convert_tokens_to_ids("<end_of_turn>"),)
    assert set(hashes(BundledPaths(tmp_path))) >= {"model/model.safetensors", "model/tokenizer.json"}


def test_activations_leave_out_bos_and_padding(tokenizer: PreTrainedTokenizerFast):
    model = new_model(SHAPE, tokenizer, seed=3)
    short, long = CHAT, Example(f"{QUESTION} Thank you.", CHAT.response)
    found = chat_activations(model, tokenizer, [long, short])
    lengths = [len(tokenizer(render(chat), add_special_tokens=False)["input_ids"]) - 1 for chat in (short, long)]
    assert found.shape == (2, sum(lengths), SHAPE.d_model)
    # Sorted by length and padded on the right: the shorter chat's rows stand first, as if it were alone.
    alone = chat_activations(model, tokenizer, [short])
    torch.testing.assert_close(found[:, : lengths[0]], alone)


def test_quality_by_hand():
    sae = DenseSae(
        layer=0,
        w_enc=torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        b_enc=torch.zeros(3),
        threshold=torch.tensor([1.5, 0.5, 0.5]),
        k=None,
        w_dec=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),
        b_dec=torch.zeros(2),
    )
    # Feature 0 fires on the first row alone, feature 1 on the second, feature 2 never; one 1.0 is lost.
    activations = torch.tensor([[2.0, 0.0], [1.0, 2.0]])
    found = quality(sae, activations)
    # Residue 1² = 1; total variance about the mean (1.5, 1): 0.25 + 1 + 0.25 + 1 = 2.5.
    assert found.fvu == pytest.approx(1 / 2.5)
    assert found.l0 == pytest.approx(1.0)
    assert found.dead == pytest.approx(1 / 3)


@pytest.mark.saelens
@pytest.mark.filterwarnings("ignore")
def test_trained_sae_reconstructs_and_is_read_back_as_measured(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    # 12 sparse directions in 8 dimensions, off-centre and far from unit scale.
    atoms = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=-1)
    coefficients = torch.rand(3000, 12, generator=generator) * (torch.rand(3000, 12, generator=generator) < 0.15)
    activations = 40 * (coefficients @ atoms) + 10
    recipe = SaeRecipe(d_sae=24, k=3.0, steps=300, batch=256, rate=1e-2)
    sae = train_sae(activations, 1, recipe, seed=0)
    again = train_sae(activations, 1, recipe, seed=0)
    found = quality(sae, activations)
    assert sae.digest() == again.digest()
    assert found.fvu < 0.1
    assert found.l0 == pytest.approx(3.0, abs=0.05)
    torch.testing.assert_close(sae.w_dec.norm(dim=-1), torch.ones(24), atol=2e-3, rtol=0)
    save_sae(sae, tmp_path, found.l0)
    stored = load_suite(tmp_path)[1].dense()
    assert quality(stored, activations) == found


def test_corpus_feeds_endlessly():
    assert len(list(islice(Corpus(0).safety(), 500))) == 500
