"""The guard: scores, explanations, and a folder that is refused when anything in it or under it is another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from demur.errors import InputError
from demur.guard import Guard, ModelName, Probe, Reading, read_prompts
from demur.model import ChatModel, Region
from demur.saes import DenseSae, Suite
from demur.testing import planted
from demur.types import FeatureId


def test_scores_tell_the_four_cases(made, guard: Guard) -> None:
    harmful, harmless = made.truth.harmful.texts[50:], made.truth.harmless.texts[50:]
    scores = guard.score([*harmful, *harmless])
    assert [each.verdict for each in scores] == ["refused"] * len(harmful) + ["harmless"] * len(harmless)
    assert [each.flagged for each in scores] == [True] * len(harmful) + [False] * len(harmless)
    assert guard.layers == (0, 2)
    # The two axes are independent: a probe that never expects a refusal turns refused requests into jailbreaks.
    never = replace(guard, refuse=replace(guard.refuse, weights=0 * guard.refuse.weights, bias=-9.0))
    assert [each.verdict for each in never.score([harmful[0], harmless[0]])] == ["jailbreak", "harmless"]
    always = replace(guard, refuse=replace(guard.refuse, weights=0 * guard.refuse.weights, bias=9.0))
    assert [each.verdict for each in always.score([harmful[0], harmless[0]])] == ["refused", "over-refusal"]


def test_a_refusal_that_is_less_sure_than_usual_is_none(made, guard: Guard) -> None:
    text = made.truth.harmful.texts[0]
    score = guard.score([text])[0]
    usual = {**guard.thresholds, "refusing": {"0.95": (1 + score.refuse) / 2}}
    assert [each.score([text])[0].verdict for each in (guard, replace(guard, thresholds=usual))] == [
        "refused", "jailbreak"
    ]  # fmt: skip


def test_thresholds_go_by_the_chosen_rate(made, guard: Guard) -> None:
    score = guard.score([made.truth.harmful.texts[0]])[0]
    middle = {"harmful": {"0.01": (1 + score.harmful) / 2, "0.05": score.harmful / 2}}
    guard = replace(guard, thresholds=middle)
    assert [each.score([made.truth.harmful.texts[0]])[0].flagged for each in (guard, guard.at(0.05))] == [False, True]
    with pytest.raises(InputError, match=r"no threshold .* 0.1; it has 0.01, 0.05"):
        guard.at(0.1)


def test_a_batch_is_scored_as_its_prompts_are(made, guard: Guard) -> None:
    texts = [made.truth.harmful.texts[0], "What is bread?"]
    batch = made.model.batch(made.model.tokenize(texts))
    for one, other in zip(guard.score_batch(batch), guard.score(texts), strict=True):
        assert one.harmful == pytest.approx(other.harmful, rel=1e-4)


def test_explanations_name_the_features_and_tokens(made, guard: Guard) -> None:
    text = made.truth.harmful.texts[0]
    found = guard.explain(text)
    assert found.score == guard.score([text])[0]
    assert guard.sparse is not None
    loudest = max(found.tokens, key=lambda token: token.harm)
    assert loudest.text.strip() in text
    assert all(token.harm == token.refusal == 0 for token in found.tokens[:3]), "BOS and header"
    loud = replace(guard, rows={n: replace(rows, b_enc=rows.b_enc + 1e6) for n, rows in guard.rows.items()})
    shown = loud.explain(text).tokens
    regions = made.model.chat.tokenize(text).regions
    assert [token.harm > 0 for token in shown] == [region >= Region.INSTRUCTION for region in regions]
    best = found.features[0]
    assert best.feature in made.truth.truth.causal
    # What features add, with the bias, is the explaining probe's logit.
    whole = guard.explain(text, top=100)
    for role, probe, chance in (
        ("harm", guard.sparse.harm, whole.sparse[0]),
        ("refusal", guard.sparse.refusal, whole.sparse[1]),
    ):
        logit = sum(each.adds for each in whole.features if each.role == role) + probe.bias
        assert 1 / (1 + np.exp(-logit)) == pytest.approx(chance, rel=1e-4)
    with pytest.raises(InputError, match="no features"):
        replace(guard, sparse=None).explain(text)


def test_a_saved_guard_scores_as_before(made, guard: Guard, tmp_path) -> None:
    folder = guard.save(tmp_path / "guard")
    texts = [*made.truth.harmful.texts[:3], *made.truth.harmless.texts[:3]]
    read = Guard.load(folder, made.model)
    assert read.score(texts) == guard.score(texts)
    one, other = read.explain(texts[0]), guard.explain(texts[0])
    assert [each.feature for each in one.features] == [each.feature for each in other.features]
    assert [each.adds for each in one.features] == pytest.approx([each.adds for each in other.features], rel=1e-4)
    assert [each.harm for each in one.tokens] == pytest.approx([each.harm for each in other.tokens], abs=1e-4)
    assert read.points == guard.points
    assert made.model.generate(texts, guard=read) == made.model.generate(texts, guard=guard)
    assert Guard.load(folder, made.model, fpr=0.05).threshold == 0.25
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "guard.json", "guard.safetensors"]
    assert "90% [60–98]" in (folder / "README.md").read_text()
    guard.save(folder)
    assert Guard.load(folder, made.model).score(texts) == guard.score(texts)


def test_one_probe_may_score_and_explain(made, guard: Guard, tmp_path) -> None:
    assert guard.sparse is not None
    both = replace(guard, harm=guard.sparse.harm, refuse=guard.sparse.refusal)
    text = made.truth.harmful.texts[0]
    read = Guard.load(both.save(tmp_path / "guard"), made.model)
    assert read.score([text]) == both.score([text])
    assert read.score([text]) != guard.score([text])
    assert [each.feature for each in read.explain(text).features] == [e.feature for e in guard.explain(text).features]


def test_features_of_a_topk_dictionary_are_kept_with_what_they_need(made, guard: Guard, tmp_path) -> None:
    """Whether one is active depends on the whole encoder."""
    generator = torch.Generator().manual_seed(0)
    w_enc, w_dec = torch.randn(64, 20, generator=generator), torch.randn(20, 64, generator=generator)
    w_enc[0] = 0  # The constant.
    sae = DenseSae(1, w_enc, torch.zeros(20), None, w_dec, 4, torch.zeros(64))
    suite = Suite.from_dense({1: sae})
    features = (FeatureId(1, 7), FeatureId(1, 3))
    reading = Reading(kind="features", features=features, pooling="max")
    probe = Probe(reading, np.array([0.01, -0.02], dtype=np.float32), 0.1)
    other = replace(guard, harm=probe, sparse=None, rows={1: suite[1].rows([7, 3])})
    texts = [*made.truth.harmful.texts[:3], *made.truth.harmless.texts[:3]]
    (values,) = read_prompts(made.model, texts, [reading], suite)
    expected = probe.probability(values)
    assert len(set(expected.tolist())) > 1
    for each in (other, Guard.load(other.save(tmp_path / "topk"), made.model)):
        assert [score.harmful for score in each.score(texts)] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("name", ["guard.json", "guard.safetensors", "README.md"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_file_is_refused_by_name(made, guard: Guard, tmp_path, name: str, damage: str) -> None:
    folder = guard.save(tmp_path / "guard")
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-20])
    else:
        # A digit of a threshold in the JSON: still valid, but not what was written.
        place = content.index(b"0.25") + 3 if name == "guard.json" else len(content) // 2
        content[place] ^= 1
        path.write_bytes(content)
    with pytest.raises(InputError, match=name):
        Guard.load(folder, made.model)


def test_a_guard_of_another_model_is_refused_and_both_are_named(guard: Guard, tmp_path) -> None:
    folder = guard.save(tmp_path / "guard")
    other = planted(seed=1)
    model = ChatModel(other.model, other.tokenizer, name="another")
    with pytest.raises(InputError, match=r"guard of planted \(weights .* the model is another \(weights"):
        Guard.load(folder, model)


def test_names_of_models() -> None:
    """Equal for the same weights in another dtype, different for one changed matrix or another template."""
    found = planted()
    model = ChatModel(found.model, found.tokenizer, name="one")
    name = ModelName.of(model)
    assert ModelName.of(ChatModel(found.model, found.tokenizer, name="moved")).fingerprint == name.fingerprint
    found.tokenizer.chat_template = str(found.tokenizer.chat_template).replace("model", "assistant")
    renamed = ChatModel(found.model, found.tokenizer, name="one")
    assert ModelName.of(renamed).fingerprint != name.fingerprint
    with torch.no_grad():
        found.model.model.layers[2].self_attn.v_proj.weight.mul_(1.01).add_(0.01)
    assert ModelName.of(model).fingerprint != name.fingerprint


def test_other_folders_are_left_alone(guard: Guard, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        guard.save(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        guard.save(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="there is no guard folder"):
        Guard.load(tmp_path / "nothing", guard.model)
