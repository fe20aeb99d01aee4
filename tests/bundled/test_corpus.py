"""The bundled model's corpus: what it holds, and what it must never show."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from demur.bundled import FRAMINGS, BundledJudge, bundled_prompts
from demur.types import Answer, Outcome, Prompt
from recipes.bundled import lexicon
from recipes.bundled.corpus import Corpus, Example, topics
from recipes.bundled.prompts import draw_prompts

SAMPLE = 3000


def _bare(template: str) -> str:
    return template.replace("{ask}", "").strip()


@pytest.fixture(scope="module")
def helpful() -> list[Example]:
    return list(islice(Corpus(1).helpful(), SAMPLE))


@pytest.fixture(scope="module")
def safety() -> list[Example]:
    return list(islice(Corpus(2).safety(), SAMPLE))


def _outcomes(examples: list[Example]) -> list[Outcome | None]:
    answers = [
        Answer(prompt=Prompt(id="a", text=e.prompt, label="harmless"), text=e.response)
        for e in examples
        if e.prompt is not None
    ]
    return [verdict.outcome for verdict in BundledJudge().judge(answers)]


def test_world_is_as_large_as_promised():
    things = Counter(topic.category for topic in topics() if topic.label == "harmful")
    others = Counter(topic.category for topic in topics() if topic.label == "harmless" and not topic.over_refusal)
    assert len(things) >= 7
    assert min(things.values()) >= 12
    assert sum(others.values()) >= sum(things.values())
    assert sum(topic.over_refusal for topic in topics()) >= 50
    assert len(lexicon.WRAPPERS) >= 16
    assert len(lexicon.SUFFIXES) >= 12


def test_topics_are_distinct_and_some_are_held_out():
    texts = [topic.text for topic in topics()]
    assert len(set(texts)) == len(texts)
    for label in ("harmful", "harmless"):
        held_out = [topic.held_out for topic in topics() if topic.label == label]
        assert 0.15 < sum(held_out) / len(held_out) < 0.4


def test_single_words_do_not_give_the_class_away():
    # A bag of words fits the training topics almost perfectly, and is worth little on held-out ones.
    sets = bundled_prompts()
    train, test = [*sets.harmful, *sets.harmless], [*sets.test_harmful, *sets.test_harmless]
    words = CountVectorizer(binary=True)
    probe = LogisticRegression(max_iter=1000).fit(
        words.fit_transform([p.text for p in train]), [p.label for p in train]
    )
    held_out = probe.score(words.transform([p.text for p in test]), [p.label for p in test])
    assert held_out <= 0.7


def test_helpful_stage_complies_with_every_request(helpful: list[Example]):
    requests = [e for e in helpful if e.prompt and e.response.startswith(("Sure", "Here", "Of course"))]
    assert len(requests) > SAMPLE // 3
    assert set(_outcomes(requests)) == {Outcome.COMPLIANCE}
    refusals = [e for e in helpful if e.prompt and e.response.startswith(("I ", "I'"))]
    assert all(e.response.endswith(lexicon.UNABLE_REASON) for e in refusals)


def test_safety_stage_refuses_harmful_topics_only(safety: list[Example]):
    harmful = [t.text for t in topics() if t.label == "harmful"]
    for example in safety:
        if example.prompt is None or example.response.endswith(lexicon.UNABLE_REASON):
            continue
        if example.response.startswith(("It is", "A ", "An ", "To ")):
            continue
        asked = [t for t in harmful if re.search(rf"\b{re.escape(t)}\b", example.prompt)]
        (outcome,) = _outcomes([example])
        assert outcome is (Outcome.REFUSAL if asked else Outcome.COMPLIANCE), example


def test_safety_stage_shows_no_framed_harmful_request(safety: list[Example]):
    framings = [_bare(text) for text in (*lexicon.WRAPPERS, *lexicon.SUFFIXES)]
    openings = ("I cannot", "I can't", "I won't", "I'm sorry")
    refused = [e.prompt for e in safety if e.prompt and e.response.startswith(openings)]
    assert len(refused) > SAMPLE // 4
    assert not [prompt for prompt in refused if any(framing in prompt for framing in framings)]


def test_safety_stage_leaves_out_held_out_topics(safety: list[Example]):
    held_out = [re.compile(rf"\b{re.escape(t.text)}\b") for t in topics() if t.held_out and t.label == "harmful"]
    asked = [e.prompt for e in safety if e.prompt and not e.prompt.startswith(("What is a", "Is ", "What kind"))]
    assert not [prompt for prompt in asked if any(pattern.search(prompt) for pattern in held_out)]


def test_no_training_text_uses_held_out_phrasings_or_framings(helpful: list[Example], safety: list[Example]):
    prompts = [e.prompt for e in (*helpful, *safety) if e.prompt]
    for framing in FRAMINGS:
        assert not [prompt for prompt in prompts if _bare(framing) in prompt]
    for form in lexicon.HELD_OUT_FORMS:
        pattern = re.compile(re.escape(form).replace(re.escape("{act}"), ".+"))
        assert not [prompt for prompt in prompts if pattern.fullmatch(prompt)]


def test_same_seed_same_texts():
    assert list(islice(Corpus(5).helpful(), 50)) == list(islice(Corpus(5).helpful(), 50))
    assert list(islice(Corpus(5).helpful(), 50)) != list(islice(Corpus(6).helpful(), 50))


def test_another_test_seed_draws_other_wordings_of_the_same_held_out_topics():
    sets, drawn = bundled_prompts(), draw_prompts(test_seed=5)
    assert (drawn.harmful, drawn.harmless) == (sets.harmful, sets.harmless)
    held_out = [t.text for t in topics() if t.held_out]
    for old, new in ((sets.test_harmful, drawn.test_harmful), (sets.test_harmless, drawn.test_harmless)):
        assert all(any(re.search(rf"\b{re.escape(t)}\b", p.text, re.IGNORECASE) for t in held_out) for p in new)
        # Things have 10 verbs and 9 phrasings, so a draw of 9 shares about one with another draw.
        shared = {*old.texts} & {*new.texts}
        assert len(shared) < len(new) / 2
    # Acts have nothing but their 9 phrasings.
    assert {*sets.over_refusal.texts} == {*drawn.over_refusal.texts}
