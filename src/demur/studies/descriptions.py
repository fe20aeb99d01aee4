"""Labels of features, and whether they hold: does a label tell held-out prompts on which its feature is strong from
others? The control reads the same prompts by another feature's label."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from demur.errors import DemurError, InputError
from demur.judges import ChatClient, Endpoint, RowFailedError
from demur.stats import Estimate, auroc, bootstrap_of
from demur.types import FeatureField, FeatureId, Prompt, Value

if TYPE_CHECKING:
    from demur.studies.context import Context
    from demur.studies.features import Card

STRONG = 0.5
"""A feature is strong on a prompt where it exceeds this share of its maximum on the prompts that it is labelled by."""
_EACH = 20
"""Held-out prompts on which a feature is strong, and of the others, that a label is tried on, at most."""
_SHOWN = 20
"""Examples of each kind that an endpoint labels a feature by."""
_MAX_TOKENS = 2048
_IDLE = frozenset({"the", "and", "for", "with", "that", "this", "are", "word", "words", "text", "related", "about"})
SOURCES = "top-tokens, neuronpedia=FILE or endpoint=MODEL"


class Description(Value):
    """A feature's label. `own` is the AUROC with which it tells the held-out prompts on which the feature is strong
    from the others, `shuffled` that of another feature's label on the same prompts; readings are yes or no, so both are
    balanced accuracies too. Unknown where the feature is strong on all held-out prompts or on none, where there is no
    label, or where its reader gave no answer."""

    feature: FeatureField
    text: str
    own: Estimate
    shuffled: Estimate


class Described(Value):
    """All labels: where they are from, who reads them, and over features the mean of both scores and of their
    difference, paired."""

    source: str
    reader: str
    rows: tuple[Description, ...]
    own: Estimate
    shuffled: Estimate
    gain: Estimate


class Trial(NamedTuple):
    """Held-out prompts that one feature's label is tried on: texts, and whether the feature is strong on each."""

    texts: tuple[str, ...]
    strong: tuple[bool, ...]


Reader = Callable[[Sequence[str], Sequence[Trial]], list[tuple[bool, ...] | None]]
"""For each label, on which texts of its trial it fits; None where it cannot be said."""


@dataclass(frozen=True)
class _Model:
    """A chat model at an endpoint that writes and reads labels."""

    name: str
    endpoint: Endpoint

    def ask(self, questions: Sequence[str]) -> list[str]:
        """One answer to each question, "" where there was none to use. Raises DemurError: no server, no such model, or
        one that fails."""
        found = [""] * len(questions)
        client = ChatClient(self.endpoint, self.name, max_tokens=_MAX_TOKENS, count=lambda _used: None)
        for place, said in client.ask([[{"role": "user", "content": each}] for each in questions]):
            if isinstance(said, str):
                found[place] = said
            elif not said.answered:
                raise _failed(self, said)
        return found

    def label(self, examples: Mapping[FeatureId, tuple[list[str], list[str]]]) -> tuple[str, ...]:
        """A label for each feature from messages on which it is strong and weak."""
        questions = [
            "A feature of a language model is strong on these messages; «» marks the token where it is strongest:\n"
            f"{_numbered(strong)}\n\nIt is weak on these:\n{_numbered(weak)}\n\nDescribe in at most 12 words what it "
            "stands for: what the first messages have in common and the others lack. Answer with the description only."
            for strong, weak in examples.values()
        ]
        return tuple(" ".join(said.split())[:200] for said in self.ask(questions))

    def read(self, labels: Sequence[str], trials: Sequence[Trial]) -> list[tuple[bool, ...] | None]:
        """For each label, on which texts of its trial the model says that it fits."""
        questions = [
            f"Description: {label}\n\nMessages:\n{_numbered(trial.texts)}\n\nWhich of these messages does the "
            "description fit? Answer with their numbers, separated by commas, or with the word none."
            for label, trial in zip(labels, trials, strict=True)
        ]
        return [_named(said, len(trial.texts)) for said, trial in zip(self.ask(questions), trials, strict=True)]


def _failed(model: _Model, error: RowFailedError) -> DemurError:
    where = f"the model {model.name!r} at {model.endpoint.public}"
    return DemurError(f"{where} does not answer: {error}; run the same command again, or without --describe")


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{n}. {' '.join(text.split())}" for n, text in enumerate(texts, 1))


def _named(said: str, n: int) -> tuple[bool, ...] | None:
    """Which of `n` numbers are named; None where the answer names neither numbers nor none."""
    numbers = {int(each) for each in re.findall(r"\d+", said)}
    if not numbers and "none" not in said.casefold():
        return None
    return tuple(place in numbers for place in range(1, n + 1))


def read_words(labels: Sequence[str], trials: Sequence[Trial]) -> list[tuple[bool, ...] | None]:
    """For each label, which texts of its trial hold a word that begins with one of the label's (of three letters or
    more): a reader that needs no model, and is fair only to labels that name words."""
    found: list[tuple[bool, ...] | None] = []
    for label, trial in zip(labels, trials, strict=True):
        words = {word for word in re.findall(r"\w{3,}", label.casefold()) if word not in _IDLE}
        pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(words)))})") if words else None
        found.append(tuple(pattern is not None and bool(pattern.search(text.casefold())) for text in trial.texts))
    return found


def asked_source(source: str, option: str = "--describe") -> tuple[str, str]:
    """Kind and name of a source of labels. Raises InputError: there is no such kind, its name is missing, or there is
    no such file."""
    kind, _, name = source.partition("=")
    if kind not in ("top-tokens", "neuronpedia", "endpoint") or (kind == "top-tokens") == bool(name):
        raise InputError(f"{option} {source!r} is no source of labels; expected {SOURCES}")
    if kind == "neuronpedia" and not Path(name).expanduser().exists():
        raise InputError(f"{option}: there is no {name}; name a file batch-N.jsonl.gz of Neuronpedia, or their folder")
    return kind, name


def check_sources(source: str, reader: str) -> None:
    """What is wrong with the two options, before anything is computed; raises as `asked_source` does."""
    if source:
        asked_source(source)
    if reader not in ("", "words") and asked_source(reader, "--describe-reader")[0] != "endpoint":
        raise InputError(f"--describe-reader {reader!r} reads nothing; expected words or endpoint=MODEL")


def bulk_labels(place: str, features: Sequence[FeatureId]) -> dict[FeatureId, str]:
    """Explanations from Neuronpedia's bulk files (`explanations/batch-N.jsonl.gz`, unpacked or not, or a folder of
    them); of several for one feature the first. Raises InputError: no file, or one of another format."""
    path = Path(place).expanduser()
    files = sorted(path.rglob("*.jsonl*")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{place} holds no files batch-N.jsonl or batch-N.jsonl.gz")
    found: dict[FeatureId, str] = {}
    wanted = set(features)
    for file in files:
        try:
            with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as f:
                for line in f:
                    row: dict[str, Any] = json.loads(line)
                    feature = FeatureId(int(str(row["layer"]).partition("-")[0]), int(row["index"]))
                    if feature in wanted:
                        found.setdefault(feature, str(row["description"]))
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is no file of Neuronpedia's explanations ({error!r})") from error
    return found


def held_out(context: Context[Any], limits: Mapping[FeatureId, float]) -> dict[FeatureId, Trial]:
    """For each feature some prompts on which it is strong (above `limits`) and others, in random order, of those that
    made no label and chose no feature: the tuning and the test split. Features that are strong on all or on none are
    left out."""
    from demur.method.activations import feature_activations, over_regions

    splits = (context.splits.tuning, context.splits.test)
    prompts = [prompt for split in splits for _, each in split for prompt in each.prompts]
    features, items = list(limits), context.model.tokenize(prompts)
    best = over_regions(items, feature_activations(context.model, context.suite, items, features))
    draw, found = random.Random(context.config.seed), dict[FeatureId, Trial]()
    for feature, values in zip(features, best.T.tolist(), strict=True):
        sides = [[n for n, value in enumerate(values) if (value > limits[feature]) == side] for side in (True, False)]
        rows = [n for side in sides for n in draw.sample(side, min(_EACH, len(side)))]
        if all(sides):
            draw.shuffle(rows)
            strong = tuple(values[n] > limits[feature] for n in rows)
            found[feature] = Trial(tuple(prompts[n].text for n in rows), strong)
    return found


def _detection(trial: Trial, said: tuple[bool, ...] | None) -> Estimate:
    if said is None:
        return Estimate.unknown()
    yes, no = ([s for s, strong in zip(said, trial.strong, strict=True) if strong == side] for side in (True, False))
    return auroc(np.array(yes, float), np.array(no, float))


def detection(
    labels: Mapping[FeatureId, str], trials: Mapping[FeatureId, Trial], read: Reader, *, source: str, reader: str
) -> Described:
    """Labels tried on held-out prompts, each beside the label of the next feature in a random order: so shuffled, none
    is its feature's own."""
    tried = [feature for feature in labels if feature in trials and labels[feature]]
    random.Random(0).shuffle(tried)
    given, own = [trials[feature] for feature in tried], [labels[feature] for feature in tried]
    readings = zip(given, read(own, given), read([*own[1:], *own[:1]], given), strict=True)
    scores = {
        feature: (_detection(trial, said), _detection(trial, other) if len(tried) > 1 else Estimate.unknown())
        for feature, (trial, said, other) in zip(tried, readings, strict=True)
    }
    nothing = (Estimate.unknown(), Estimate.unknown())
    rows = [
        Description(feature=feature, text=text, own=both[0], shuffled=both[1])
        for feature, text in labels.items()
        for both in (scores.get(feature, nothing),)
    ]
    table = np.array([(a.value, b.value) for a, b in scores.values()]).reshape(-1, 2)
    table = table[~np.isnan(table).any(1)]
    own_mean, shuffled, gain = (
        bootstrap_of(mean, table) for mean in (lambda m: m[:, 0], lambda m: m[:, 1], lambda m: m[:, 0] - m[:, 1])
    )
    return Described(source=source, reader=reader, rows=tuple(rows), own=own_mean, shuffled=shuffled, gain=gain)


def _examples(
    context: Context[Any], features: Sequence[FeatureId], prompts: Sequence[Prompt]
) -> dict[FeatureId, tuple[float, list[str], list[str]]]:
    """For each feature its maximum on some prompts, those on which it is strongest, marked, and others at random."""
    from demur.method.activations import feature_activations
    from demur.model import SCORED_REGIONS, Region

    model, items = context.model, context.model.tokenize(prompts)
    inside = [np.isin(item.regions, SCORED_REGIONS) for item in items]
    values = [
        v.numpy() * w[:, None]
        for v, w in zip(feature_activations(model, context.suite, items, features), inside, strict=True)
    ]

    def marked(place: int, n: int) -> str:
        item, token = items[place], int(values[place][:, n].argmax())
        if item.regions[token] != Region.INSTRUCTION:
            return prompts[place].text
        words = [p for p, region in enumerate(item.regions) if region == Region.INSTRUCTION]
        parts = [
            [item.ids[p] for p in words if p < token],
            [item.ids[token]],
            [item.ids[p] for p in words if p > token],
        ]
        before, at, after = map(model.decode, parts)
        return f"{before}«{at}»{after}"

    found: dict[FeatureId, tuple[float, list[str], list[str]]] = {}
    for n, feature in enumerate(features):
        best = np.array([each[:, n].max() for each in values])
        limit, order = STRONG * float(best.max()), np.argsort(-best, kind="stable").tolist()
        weak = [place for place in order if best[place] <= limit]
        weak = random.Random(context.config.seed).sample(weak, min(_SHOWN, len(weak)))
        strong = [marked(place, n) for place in order[:_SHOWN] if best[place] > limit]
        found[feature] = limit, strong, [prompts[place].text for place in weak]
    return found


def describe(context: Context[Any], cards: Sequence[Card], prompts: Sequence[Prompt]) -> Described:
    """Labels of the cards' features from the source that the configuration names, made from `prompts` and tried on
    held-out ones. Raises DemurError: no endpoint, or no such file."""
    source, reader = context.config.describe, context.config.describe_reader
    kind, name = asked_source(source)
    examples = _examples(context, [card.feature for card in cards], prompts)
    if kind == "top-tokens":
        seen = {c.feature: dict.fromkeys(token.strip() for token, mean, _ in c.tokens if mean > 0) for c in cards}
        labels = {feature: ", ".join(filter(None, tokens)) for feature, tokens in seen.items()}
    elif kind == "neuronpedia":
        known = bulk_labels(name, [card.feature for card in cards])
        labels = {feature: known.get(feature, "") for feature in examples}
    else:
        model, shown = _Model(name, Endpoint()), {f: (strong, weak) for f, (_, strong, weak) in examples.items()}
        depends = {"model": name, "endpoint": model.endpoint.public, "examples": list(shown.values())}
        texts = context.cached("labels", depends, tuple[str, ...], partial(model.label, shown), "labels")
        labels = dict(zip(shown, texts, strict=True))
    reader = reader or (source if kind == "endpoint" else "words")
    trials = held_out(context, {feature: limit for feature, (limit, *_) in examples.items()})
    how: Reader = (
        read_words if reader == "words" else _Model(asked_source(reader, "--describe-reader")[1], Endpoint()).read
    )
    depends = {
        "labels": list(labels.items()),
        "trials": [(feature, trial.texts, trial.strong) for feature, trial in trials.items()],
        "reader": [reader, "" if reader == "words" else Endpoint().public],
    }
    compute = partial(detection, labels, trials, how, source=source, reader=reader)
    return context.cached("detection", depends, Described, compute, "labels on held-out prompts")
