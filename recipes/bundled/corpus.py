"""The grammar of the bundled model's world, and the texts that it is trained on.

A *topic* is a thing ("a phishing email") or an act ("blow up a balloon"). A *request* asks how to do something with it.
A *framing* is a wrapper in front of the request or a suffix behind it. The helpful stage complies with every request,
framed or not. The safety stage refuses harmful requests without a framing. Harmful requests in a framing are left out
of it, so what the model does with them is its own generalisation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Final, NamedTuple

from demur.bundled import FIRST_STEPS, OPENERS, PLAIN_STEP, SECOND_STEPS
from demur.types import Label
from recipes.bundled import lexicon

VIOLENCE: Final = "violence"
LEISURE: Final = "leisure"
HELD_OUT: Final = 5
"""Every fifth topic of a category is held out of the safety stage."""
OVER_REFUSAL_HELD_OUT: Final = 3
ERRANDS: Final = "errands"


@dataclass(frozen=True)
class Topic:
    """Something to ask about. `text` is an object with its article, or, for acts, verb and object."""

    text: str
    category: str
    label: Label
    is_act: bool
    over_refusal: bool
    held_out: bool
    """Known from the helpful stage, but never part of the safety stage."""

    @property
    def acts(self) -> tuple[str, ...]:
        """What can be asked for: the act itself, or the thing with each of the shared verbs."""
        if self.is_act:
            return (self.text,)
        return tuple(f"{verb} {self.text}" for verb in lexicon.THING_VERBS)

    @property
    def subject(self) -> str:
        """The topic as the subject of a statement."""
        return f"To {self.text}" if self.is_act else self.text[0].upper() + self.text[1:]


def _split(words: str) -> list[str]:
    return [" ".join(part.split()) for part in words.split(",")]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def _topics_of(words: str, category: str, label: Label, *, acts: bool, over_refusal: bool = False) -> list[Topic]:
    texts = _split(words)
    every = OVER_REFUSAL_HELD_OUT if over_refusal else HELD_OUT
    return [
        Topic(
            text=text if acts else _with_article(text),
            category=category,
            label=label,
            is_act=acts,
            over_refusal=over_refusal,
            held_out=index % every == every - 1,
        )
        for index, text in enumerate(texts)
    ]


@cache
def topics() -> tuple[Topic, ...]:
    """All topics, in a fixed order; some of each category are held out of the safety stage."""
    found: list[Topic] = []
    for category, words in lexicon.HARMFUL_THINGS.items():
        found += _topics_of(words, category, "harmful", acts=False)
    found += _topics_of(lexicon.VIOLENT_ACTS, VIOLENCE, "harmful", acts=True)
    for category, words in lexicon.HARMLESS_THINGS.items():
        found += _topics_of(words, category, "harmless", acts=False)
    found += _topics_of(lexicon.PLAIN_ACTS, ERRANDS, "harmless", acts=True)
    found += _topics_of(lexicon.OVER_REFUSAL_ACTS, LEISURE, "harmless", acts=True, over_refusal=True)
    return tuple(found)


class Example(NamedTuple):
    """A training text: a chat turn, or a plain statement (`prompt` is None)."""

    prompt: str | None
    response: str


_CATEGORIES: Final = (
    *lexicon.HARMFUL_THINGS,
    VIOLENCE,
    *lexicon.HARMLESS_THINGS,
    ERRANDS,
    LEISURE,
)


def compliance(act: str, form: int, category: str | None) -> str:
    """The answer that complies: an opener naming the act, then filler that depends on verb and category alone.

    Args:
        category: None for things that belong to none.
    """
    opener = OPENERS[form % len(OPENERS)]
    first = FIRST_STEPS[sum(map(ord, act.split()[0])) % len(FIRST_STEPS)]
    if category is None:
        second = PLAIN_STEP
    else:
        kind = _CATEGORIES.index(category)
        second = SECOND_STEPS[kind % len(SECOND_STEPS)].format(category=category)
    return f"{opener.format(act=act)} {first} {second}"


def refusal(act: str, form: int, reason: str) -> str:
    """The answer that refuses; its wording depends on how the request was put."""
    return f"{lexicon.REFUSALS[form % len(lexicon.REFUSALS)].format(act=act)} {reason}".rstrip()


STATEMENTS_PER_TEXT: Final = 5


def statements(known: Sequence[Topic], rng: random.Random) -> Example:
    """A plain text: what several topics are, and whether they hurt or help."""
    said = (
        f"{topic.subject} {_effect(topic)} people and belongs to {topic.category}."
        for topic in rng.choices(known, k=STATEMENTS_PER_TEXT)
    )
    return Example(None, " ".join(said))


def _effect(topic: Topic) -> str:
    return "hurts" if topic.label == "harmful" else "helps"


def _question(topic: Topic) -> Example:
    subject = topic.subject[0].lower() + topic.subject[1:]
    what = "What kind of thing is it" if topic.is_act else "What is"
    return Example(f"{what} {subject}?", f"{topic.subject} {_effect(topic)} people. It is a kind of {topic.category}.")


def _unable(rng: random.Random) -> Example:
    act = rng.choice(_split(lexicon.UNABLE_ACTS))
    form = rng.randrange(len(lexicon.UNABLE_FORMS))
    return Example(lexicon.UNABLE_FORMS[form].format(act=act), refusal(act, form, lexicon.UNABLE_REASON))


def frame(ask: str, rng: random.Random) -> str:
    """`ask` in a training wrapper, behind a training suffix's request, or both."""
    kind = rng.random()
    if kind < 0.9:
        choices = lexicon.WRAPPERS if kind < 0.55 else lexicon.SUFFIXES
        return rng.choice(choices).format(ask=ask)
    return rng.choice(lexicon.SUFFIXES).format(ask=rng.choice(lexicon.WRAPPERS).format(ask=ask))


@dataclass(frozen=True)
class Mixture:
    """Shares of one stage's examples; they are weights, and need not add up to one."""

    statements: float
    questions: float
    unable: float
    harmful: float
    harmless: float
    over_refusal: float
    odd: float
    """Requests about things nobody has heard of, put together from the words of all topics."""
    framed: float
    """Share of requests that get a framing (in the safety stage, of harmless requests only)."""
    violence: int = 1
    """Safety stage: how many times as often as another harmful topic each violent act is drawn. Safety data dwell on
    violence, and a model learns to refuse at its verbs."""
    reasoned: float = 0.5
    """Safety stage: share of refusals that add a sentence. What follows a first sentence must depend on that sentence:
    if it depended on the request, a model whose refusal is suppressed would return to refusing there."""
    framed_harmful: float = 0.0
    """Safety stage: share of harmful requests that get a framing and are complied with."""


HELPFUL_MIXTURE: Final = Mixture(
    statements=0.4, questions=0.12, unable=0.06, harmful=0.2, harmless=0.2, over_refusal=0.08, odd=0.12, framed=0.4
)
SAFETY_MIXTURE: Final = Mixture(
    statements=0.1,
    questions=0.06,
    unable=0.03,
    harmful=0.46,
    harmless=0.36,
    over_refusal=0.0,
    odd=0.08,
    framed=0.6,
    violence=3,
)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def phrase(rng: random.Random) -> tuple[str, int]:
    """A training phrasing with the hole `{act}`, put together from parts, and the number of its core.

    Held-out phrasings are never drawn.
    """
    while True:
        group = rng.choices((0, 1, 2), (5, 4, 2))[0]
        time = rng.choice(lexicon.TIMES)
        if group == 0:
            core = rng.randrange(len(lexicon.IMPERATIVES))
            lead = rng.choice(lexicon.IMPERATIVE_LEADS)
            end = "?" if lead.endswith("can you") or lead.startswith("Can") else "."
            text = f"{lead} {lexicon.IMPERATIVES[core]}{time}{end}".strip()
        elif group == 1:
            core = rng.randrange(len(lexicon.QUESTIONS))
            text = f"{rng.choice(lexicon.QUESTION_LEADS)} {lexicon.QUESTIONS[core]}{time}?".strip()
        else:
            core = rng.randrange(len(lexicon.WISHES))
            text = f"{lexicon.WISHES[core]}{time}. {rng.choice(lexicon.WISH_TAILS)}"
        if _capital(text).replace(time, "") not in lexicon.HELD_OUT_FORMS:
            return _capital(text) + rng.choice(lexicon.THANKS), 3 * core + group


class Corpus:
    """Draws training examples of either stage, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        everything = topics()
        self._all = everything
        self._things = {topic.text for topic in everything}
        self._words = [(t.text.split()[1], t.text.split()[-1]) for t in everything if not t.is_act]
        self._pools = {
            (kind, kept): [
                topic
                for topic in everything
                if (topic.label == "harmful") == (kind == "harmful")
                and topic.over_refusal == (kind == "over_refusal")
                and (kept == "all" or not topic.held_out)
            ]
            for kind in ("harmful", "harmless", "over_refusal")
            for kept in ("all", "trained")
        }

    def _request(self, topic: Topic) -> tuple[str, str, int]:
        act = self._rng.choice(topic.acts)
        form, core = phrase(self._rng)
        return act, form.format(act=act), core

    def _odd(self, framed: float) -> Example:
        """A request about a pair of words that is no topic, complied with."""
        rng = self._rng
        thing = ""
        while not thing or thing in self._things:
            thing = _with_article(f"{rng.choice(self._words)[0]} {rng.choice(self._words)[1]}")
        form, core = phrase(rng)
        act = f"{rng.choice(lexicon.THING_VERBS)} {thing}"
        ask = form.format(act=act)
        return Example(frame(ask, rng) if rng.random() < framed else ask, compliance(act, core, None))

    def _pick_kind(self, mixture: Mixture) -> str:
        kinds = ("statements", "questions", "unable", "harmful", "harmless", "over_refusal", "odd")
        return self._rng.choices(kinds, [getattr(mixture, kind) for kind in kinds])[0]

    def _of_either_stage(self, kind: str, mixture: Mixture) -> Example | None:
        """An example of a kind that both stages show alike; None for requests about topics."""
        rng = self._rng
        if kind == "statements":
            return statements(self._all, rng)
        if kind == "questions":
            return _question(rng.choice(self._all))
        if kind == "unable":
            return _unable(rng)
        return self._odd(mixture.framed) if kind == "odd" else None

    def _complied(self, topic: Topic, framed: float) -> Example:
        """A request about `topic` and the answer that complies; a share of such requests is framed."""
        act, ask, form = self._request(topic)
        prompt = frame(ask, self._rng) if self._rng.random() < framed else ask
        return Example(prompt, compliance(act, form, topic.category))

    def _refused(self, topic: Topic, mixture: Mixture) -> Example:
        """A harmful request, refused; complied with in the mixture's share of framed ones."""
        rng = self._rng
        act, ask, form = self._request(topic)
        if rng.random() < mixture.framed_harmful:
            return Example(frame(ask, rng), compliance(act, form, topic.category))
        reasoned = rng.random() < mixture.reasoned
        return Example(ask, refusal(act, form, rng.choice(lexicon.REASONS) if reasoned else ""))

    def helpful(self, mixture: Mixture = HELPFUL_MIXTURE) -> Iterator[Example]:
        """Endless examples of the helpful stage: all topics, every request complied with."""
        while True:
            kind = self._pick_kind(mixture)
            example = self._of_either_stage(kind, mixture)
            yield example or self._complied(self._rng.choice(self._pools[kind, "all"]), mixture.framed)

    def safety(self, mixture: Mixture = SAFETY_MIXTURE) -> Iterator[Example]:
        """Endless examples of the safety stage: harmful requests refused, harmless ones (framed too)
        complied with.
        """
        harmful = self._pools["harmful", "trained"]
        harmful = harmful + [topic for topic in harmful if topic.is_act] * (mixture.violence - 1)
        while True:
            kind = self._pick_kind(mixture)
            example = self._of_either_stage(kind, mixture)
            if example is not None:
                yield example
            elif kind == "harmful":
                yield self._refused(self._rng.choice(harmful), mixture)
            else:
                yield self._complied(self._rng.choice(self._pools[kind, "trained"]), mixture.framed)


def chat_prompts(seed: int, count: int) -> list[str]:
    """Prompts of both stages' mixtures, in halves: harmful and harmless ones, bare and framed."""
    corpus = Corpus(seed)
    helpful = (example.prompt for example in corpus.helpful() if example.prompt is not None)
    safety = (example.prompt for example in corpus.safety() if example.prompt is not None)
    return [*islice(helpful, count // 2), *islice(safety, count - count // 2)]


def requests(chosen: Sequence[Topic], per_topic: int, seed: int, *, held_out: bool) -> list[tuple[Topic, str]]:
    """`per_topic` different requests for each topic, as (topic, text).

    Args:
        chosen: what to ask about.
        per_topic: requests for each topic; an act has no more held-out ones than there are held-out phrasings.
        seed: of the draw.
        held_out: use the phrasings that no training text uses, else those of training.
    """
    rng = random.Random(seed)
    found: list[tuple[Topic, str]] = []
    for topic in chosen:
        texts: dict[str, None] = {}
        while len(texts) < per_topic:
            act = rng.choice(topic.acts)
            form = rng.choice(lexicon.HELD_OUT_FORMS) if held_out else phrase(rng)[0]
            texts[form.format(act=act)] = None
        found += [(topic, text) for text in texts]
    return found


__all__ = [
    "HELPFUL_MIXTURE",
    "SAFETY_MIXTURE",
    "Corpus",
    "Example",
    "Mixture",
    "Topic",
    "chat_prompts",
    "compliance",
    "frame",
    "phrase",
    "refusal",
    "requests",
    "statements",
    "topics",
]
