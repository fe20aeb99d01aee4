"""Answers watched while they are written, against passes over the finished ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from demur.errors import InputError
from demur.guard import Guard, Probe, Reading, Stream
from demur.model import Region, count_hooks


def whole_answers(made, texts):
    return made.model.generate(texts, max_new_tokens=8)


def at_answer(made, text: str, answer: str, layer: int) -> np.ndarray:
    """Residuals at the tokens of an answer, from one pass over the finished conversation."""
    item = made.model.chat.tokenize(text, answer)
    with torch.inference_mode(), made.model.capture([layer]) as residuals:
        made.model.last_logits(made.model.batch([item]))
    return residuals[layer][0].numpy()[np.array(item.regions) == Region.RESPONSE]


def random_stream(made, window: int, threshold: float) -> Stream:
    weights = np.random.default_rng(0).normal(size=made.model.d_model).astype(np.float32)
    weights[0] = 0  # The constant.
    return Stream(Probe(Reading(kind="dense", layer=2), weights, 0.5), window, threshold)


@pytest.mark.parametrize("window", [1, 3])
def test_the_running_score_is_that_of_the_finished_answer(made, guard: Guard, window: int) -> None:
    texts = [made.truth.harmful.texts[0], made.truth.harmless.texts[0] + " today"]
    answers = whole_answers(made, texts)
    stream = random_stream(made, window, np.inf)
    batch = made.model.batch(made.model.tokenize(texts))
    with replace(guard, stream=stream).watch(batch) as watch:
        made.model.hf.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=8, do_sample=False
        )
    dots = torch.stack(watch.dots, 1).numpy()
    for row, (text, answer) in enumerate(zip(texts, answers.texts, strict=True)):
        residuals = at_answer(made, text, answer, 2)
        expected = [
            residuals[max(0, n + 1 - window) : n + 1].mean(0) @ stream.probe.weights + 0.5
            for n in range(len(residuals))
        ]
        np.testing.assert_allclose(stream.running(residuals), expected, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(dots[row, : len(residuals)], residuals @ stream.probe.weights, rtol=1e-3, atol=2e-3)


def test_a_row_stops_before_the_token_that_passes_the_threshold(made, guard: Guard) -> None:
    texts = [made.truth.harmless.texts[0], made.truth.harmful.texts[0], made.truth.harmless.texts[1] + " today"]
    before = whole_answers(made, texts)
    stream = random_stream(made, 1, np.inf)
    scores = [stream.running(at_answer(made, t, a.text, 2)) for t, a in zip(texts, before, strict=True)]
    # Between the two highest scores of the first answer, so that exactly one token passes.
    threshold = float(np.sort(scores[0])[-2:].mean())
    watching = replace(guard, stream=replace(stream, threshold=threshold))
    after = made.model.generate(texts, max_new_tokens=8, guard=watching)
    ids = [made.model.tokenizer(a.text, add_special_tokens=False)["input_ids"] for a in before]
    for old, new, running, tokens in zip(before, after, scores, ids, strict=True):
        over = np.flatnonzero(running > threshold)
        if len(over):
            assert (new.stopped, new.finished) == (True, False)
            assert new.text == made.model.decode(tokens[: over[0]])
        else:
            assert new == old
    assert after[0].stopped


def test_nothing_is_stopped_below_the_threshold_and_no_pass_is_added(made, guard: Guard) -> None:
    texts = [*made.truth.harmful.texts[:2], *made.truth.harmless.texts[:2]]
    passes: list[int] = []
    handle = made.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    try:
        before = whole_answers(made, texts)
        once = len(passes)
        hooks = count_hooks(made.model.hf)
        quiet = replace(guard, stream=random_stream(made, 2, np.inf))
        assert made.model.generate(texts, max_new_tokens=8, guard=quiet) == before
        assert len(passes) == 2 * once
        assert count_hooks(made.model.hf) == hooks
        loud = replace(guard, stream=random_stream(made, 2, -np.inf))
        stopped = made.model.generate(texts, max_new_tokens=8, guard=loud)
        assert [(a.text, a.stopped) for a in stopped] == [("", True)] * 4
        assert len(passes) < 3 * once, "a batch of stopped answers ends at once"
    finally:
        handle.remove()


def test_what_cannot_watch_is_refused(made, guard: Guard) -> None:
    with pytest.raises(InputError, match="no streaming probe"):
        made.model.generate(["one prompt"], guard=replace(guard, stream=None))
    with pytest.raises(InputError, match="residual of one layer"):
        Stream(replace(guard.harm, unit=True), 1, 0.0)
    with pytest.raises(InputError, match="at least one token"):
        Stream(guard.harm, 0, 0.0)
