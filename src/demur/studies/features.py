"""Feature cards: what each feature of F*, and each of the strongest harm features, fires on and writes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

import numpy as np
from pydantic import Field

from demur.errors import DemurError
from demur.offline import is_offline
from demur.report import charts
from demur.report import format as fmt
from demur.report.blocks import Block, Chart, Section, Table, Text
from demur.stats import Estimate, wilson
from demur.studies.base import Study, StudyResult
from demur.studies.config import FindConfig
from demur.studies.descriptions import Described, check_sources, describe
from demur.studies.roles import FeatureRole
from demur.types import FeatureId, Label, Value

if TYPE_CHECKING:
    from torch import Tensor

    from demur.model import TokenizedPrompt
    from demur.studies.context import Context

NEURONPEDIA = "https://www.neuronpedia.org"
_BINS = 12
_CHARTS = 12
"""Cards whose histogram is drawn."""
_LENS_PROMPTS = 8


class Config(FindConfig):
    """Cards of the features that mediate refusal."""

    group: ClassVar[str] = "Feature cards"

    harm_features: int = Field(default=10, ge=0)
    """Harm features shown beside F*: those with the largest effect on refusal."""
    examples: int = Field(default=5, ge=1)
    """Prompts and tokens shown for each feature."""
    neuronpedia: bool = True
    """Ask Neuronpedia for the features' descriptions, where it has these SAEs and a network is there."""
    describe: str = ""
    """Label the features from top-tokens, neuronpedia=FILE (its bulk explanations, or a folder of them) or
    endpoint=MODEL (a model at OPENAI_BASE_URL), and try each label on held-out prompts (default: no)."""
    describe_reader: str = ""
    """Who reads labels on held-out prompts: words or endpoint=MODEL (default: who wrote them, else words)."""


class Example(Value):
    """A prompt on which a feature fires, with the token where it fires most."""

    prompt: str
    label: Label
    token: str
    activation: float


class Spread(Value):
    """A feature's maximum activation in each prompt of a class, over the tokens of a region: in how many prompts it
    fires, and how many prompts fall in each of the card's bins."""

    label: Label
    region: str
    fires: Estimate
    counts: tuple[int, ...]


class Card(Value):
    """One feature. `score` is its attribution in F*, None for a harm feature. `tokens` are those with its highest mean
    activation (token, mean, times seen); `promotes` and `demotes` the next tokens whose logits it moves most when added
    after the last layer. `edges` bound the bins of `spreads`, in the SAE's units."""

    role: FeatureRole
    score: float | None
    tokens: tuple[tuple[str, float, int], ...]
    examples: tuple[Example, ...]
    promotes: tuple[str, ...]
    demotes: tuple[str, ...]
    edges: tuple[float, ...]
    spreads: tuple[Spread, ...]
    url: str = ""
    description: str = ""

    @property
    def feature(self) -> FeatureId:
        return self.role.feature


class Result(StudyResult):
    """The cards, F* first."""

    cards: tuple[Card, ...]
    list_url: str = ""
    """A Neuronpedia list of the refusal features."""
    described: Described | None = None
    """The labels that were asked for, and how they did on held-out prompts."""


def run(context: Context[Any]) -> Result:
    """Describe the features on the prompts that chose the direction; only labels are tried on others."""
    from demur.studies import pipeline
    from demur.studies.inputs import neuronpedia_source
    from demur.studies.roles import Roles, find_roles, harm_features

    config: Config = context.config
    check_sources(config.describe, config.describe_reader)
    found = pipeline.find(context, context.splits.choosing)
    harm = harm_features(context, found, config.harm_features) if config.harm_features else Roles(features=())
    own = find_roles(context, found)
    rows = tuple({row.feature: row for row in (*own.features, *harm.features)}.values())
    features = [row.feature for row in rows]
    scores = dict(zip(found.chosen.features, found.chosen.scores, strict=True))
    used = found.clean.used("direction")
    depends = {
        "prompts": [used.harmful.digest, used.harmless.digest],
        "roles": [each.digest for _, each in found.clean.used("selection")],
        "features": features,
        "examples": config.examples,
    }

    def compute() -> tuple[Card, ...]:
        return tuple(_cards(context, rows, scores, {"harmful": used.harmful, "harmless": used.harmless}))

    cards = context.cached("cards", depends, tuple[Card, ...], compute, "feature cards")
    described = describe(context, cards, (*used.harmful, *used.harmless)) if config.describe else None
    texts = {str(row.feature): row.text for row in described.rows} if described else {}
    source = neuronpedia_source(config)
    if source and config.neuronpedia and not described:
        texts = _descriptions(context, source, features)
    found_of = {f: {"url": _page(source, f) if source else "", "description": texts.get(str(f), "")} for f in features}
    cards = tuple(card.model_copy(update=found_of[card.feature]) for card in cards)
    link = _list_url(source, own.of("refusal"), context.inputs.title) if source else ""
    return Result(cards=cards, list_url=link, described=described)


def _cards(
    context: Context[Any], rows: Sequence[FeatureRole], scores: dict[FeatureId, float], classes: dict[Label, Any]
) -> Iterator[Card]:
    from demur.method.activations import feature_activations

    model, features, shown = context.model, [row.feature for row in rows], context.config.examples
    prompts = [prompt for each in classes.values() for prompt in each.prompts]
    labels: list[Label] = [label for label, each in classes.items() for _ in each.prompts]
    items = model.tokenize(prompts)
    values = [
        each * _scored(item)[:, None]
        for item, each in zip(items, feature_activations(model, context.suite, items, features), strict=True)
    ]
    for n, row in enumerate(rows):
        own = [each[:, n] for each in values]
        maxima = [float(each.max()) for each in own]
        edges, spreads = _spreads(labels, items, own)
        best = sorted(range(len(items)), key=lambda p: -maxima[p])[:shown]
        lens = _lens(context, row.feature, items, max(maxima))
        yield Card(
            role=row,
            score=scores.get(row.feature),
            tokens=_tokens(context, items, own),
            examples=tuple(
                Example(
                    prompt=prompts[p].text,
                    label=labels[p],
                    token=model.decode([items[p].ids[int(own[p].argmax())]]),
                    activation=maxima[p],
                )
                for p in best
            ),
            promotes=lens[0],
            demotes=lens[1],
            edges=edges,
            spreads=spreads,
        )


def _scored(item: TokenizedPrompt) -> Tensor:
    """True where features are scored: not on BOS and headers."""
    import torch

    from demur.model import SCORED_REGIONS

    return torch.isin(torch.tensor(item.regions), torch.tensor(SCORED_REGIONS))


def _spreads(
    labels: Sequence[Label], items: Sequence[TokenizedPrompt], values: Sequence[Tensor]
) -> tuple[tuple[float, ...], tuple[Spread, ...]]:
    from demur.method.activations import over_regions
    from demur.model import Region

    regions = {"instruction": Region.INSTRUCTION, "post-instruction": Region.POST_INSTRUCTION}
    own = {name: over_regions(items, values, [region]).tolist() for name, region in regions.items()}
    maxima: dict[tuple[Label, str], list[float]]
    maxima = {
        (label, name): [value for value, each in zip(own[name], labels, strict=True) if each == label]
        for label in dict.fromkeys(labels)
        for name in regions
    }
    top = max(max(each) for each in maxima.values()) or 1.0
    edges = np.linspace(0.0, top, _BINS + 1)
    spreads = tuple(
        Spread(
            label=label,
            region=name,
            fires=Estimate.of(wilson(sum(value > 0 for value in each), len(each))),
            counts=tuple(np.histogram(each, edges)[0].tolist()),
        )
        for (label, name), each in maxima.items()
    )
    return tuple(edges.tolist()), spreads


def _tokens(
    context: Context[Any], items: Sequence[TokenizedPrompt], values: Sequence[Tensor]
) -> tuple[tuple[str, float, int], ...]:
    """Tokens with the highest mean activation, of those on which the feature fires."""
    seen: dict[int, list[float]] = defaultdict(list)
    for item, own in zip(items, values, strict=True):
        for token, value in zip(item.ids, own.tolist(), strict=True):
            seen[token].append(value)
    means = {token: sum(each) / len(each) for token, each in seen.items() if max(each) > 0}
    best = sorted(means, key=lambda token: -means[token])[: context.config.examples]
    return tuple((context.model.decode([token]), means[token], len(seen[token])) for token in best)


def _lens(
    context: Context[Any], feature: FeatureId, items: Sequence[TokenizedPrompt], size: float
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Decoder logit lens: tokens whose logits rise and fall most when the feature, at its maximum, is added after the
    last layer, through the final norm as it is on real prompts."""
    import torch

    from demur.method.interventions import AddDirection, Compiled

    model = context.model
    row = context.suite[feature.layer].rows([feature.index]).w_dec[0]
    step = max(1, len(items) // _LENS_PROMPTS)
    batch = model.batch(items[::step][:_LENS_PROMPTS])
    with torch.inference_mode():
        before = model.last_logits(batch)
        with Compiled(model, None, [AddDirection(row, model.n_layers - 1, size or 1.0)]).on(batch):
            change = (model.last_logits(batch) - before).mean(0)
    k = context.config.examples
    up, down = change.topk(k).indices.tolist(), (-change).topk(k).indices.tolist()
    return tuple(model.decode([t]) for t in up), tuple(model.decode([t]) for t in down)


def _descriptions(context: Context[Any], source: str, features: Sequence[FeatureId]) -> dict[str, str]:
    """Feature → Neuronpedia's description of it; none where it cannot be reached, which is a warning."""
    if is_offline():
        return {}
    try:
        depends, ask = {"source": source, "features": list(features)}, lambda: dict(_ask(source, features))
        return context.cached("neuronpedia", depends, dict[str, str], ask, "Neuronpedia")
    except DemurError as error:
        context.warn(str(error))
        return {}


def _ask(source: str, features: Sequence[FeatureId], *, timeout: float = 10.0) -> Iterator[tuple[str, str]]:
    import httpx

    with httpx.Client(timeout=timeout, follow_redirects=True) as client:
        for feature in features:
            address = _page(source, feature, "/api/feature")
            try:
                answer = client.get(address)
                answer.raise_for_status()
                found: list[dict[str, Any]] = answer.json().get("explanations") or []
            except (httpx.HTTPError, ValueError) as error:
                raise DemurError(
                    f"Neuronpedia gave no descriptions ({address}: {error}); the cards are complete without them. Run "
                    "again to ask again, or leave them out with --no-neuronpedia"
                ) from error
            yield str(feature), str(found[0].get("description", "")) if found else ""


def _page(source: str, feature: FeatureId, under: str = "") -> str:
    return f"{NEURONPEDIA}{under}/{source.format(layer=feature.layer)}/{feature.index}"


def _list_url(source: str, features: Sequence[FeatureId], title: str) -> str:
    model, _, layer = source.partition("/")
    rows = [{"modelId": model, "layer": layer.format(layer=f.layer), "index": str(f.index)} for f in features]
    name = quote(f"refusal features of {title}")
    return f"{NEURONPEDIA}/quick-list/?name={name}&features={quote(json.dumps(rows))}" if rows else ""


# -- what is shown -----------------------------------------------------------------------------------------------------


def sections(result: Result) -> list[Section]:
    """A table of all cards first; then where each feature fires, and on which prompts."""
    roles = [card.role.role for card in result.cards if card.score is not None]
    verdict = (
        f"Of the {len(roles)} features of F*, {roles.count('refusal')} fire where the answer begins (refusal), "
        f"{roles.count('harm')} on the user's words (harm) and {roles.count('mixed')} on both or neither."
    )
    doubts = tuple(Text(warning, "warning") for warning in result.warnings)
    described = any(card.description for card in result.cards)
    scores = {row.feature: (row.own, row.shuffled) for row in result.described.rows} if result.described else {}
    tried = (
        " | > detection: AUROC of the label on held-out prompts | > shuffled: of another feature's label"
        if scores
        else ""
    )
    origin = result.described.source if result.described else "Neuronpedia"
    columns = (
        "feature | role: by where its activation tells refused harmful prompts from answered harmless ones | > score: "
        "attribution in F*, logits per token | > on post-instruction tokens: share of what tells the classes apart | "
        "tokens: highest mean activation | promotes: logits that it raises after the last layer"
    )
    table = Table.of(
        "Features",
        columns + (f" | description: {origin}" + tried if described else ""),
        [
            (
                str(card.feature),
                card.role.role,
                "–" if card.score is None else fmt.measure(card.score, 3),
                card.role.share,
                " ".join(fmt.token_text(token) for token, *_ in card.tokens),
                " ".join(map(fmt.token_text, card.promotes)),
                *((card.description, *map(fmt.estimate_text, scores.get(card.feature, ()))) if described else ()),
            )
            for card in result.cards
        ],
        strong=[n for n, card in enumerate(result.cards) if card.score is not None],
        caption="Strong: F*. The others are the harm features with the largest effect on refusal. Place alone does not "
        "prove a role: `demur circuit` and `demur categories` test what scaling the features does.",
    )
    links: tuple[Block, ...] = ()
    if result.list_url:
        rows = [(str(card.feature), card.url) for card in result.cards]
        note = Text(f"All refusal features as a Neuronpedia list: {result.list_url}", "note")
        links = (note, Table.of("Pages on Neuronpedia", "feature | page", rows, folded=True))
    return [
        Section("Feature cards", (Text(verdict, "verdict"), *_labels(result), *doubts, table, *links), brief=True),
        Section(
            "Where they fire",
            (*map(_histogram, result.cards[:_CHARTS]), _firing(result)),
            intro="Maximum activation in each prompt, over the user's words and over the template tokens after them.",
        ),
        Section("Prompts that activate them most", tuple(map(_examples, result.cards))),
    ]


def _labels(result: Result) -> tuple[Text, ...]:
    """Whether labels say anything of where their features are strong."""
    if (found := result.described) is None:
        return ()
    if not found.gain.n:
        return (Text("No label could be tried: no feature is strong on some held-out prompts only.", "warning"),)
    own, shuffled, gain = (fmt.estimate_text(each) for each in (found.own, found.shuffled, found.gain))
    text = (
        f"Labels from {found.source}, read by {found.reader}, tell the held-out prompts on which their features are "
        f"strong with a mean AUROC of {own} over {found.own.n} features; labels of other features with {shuffled} "
        f"(difference {gain})."
    )
    bad = not found.gain.low > 0
    return (
        Text(
            text + (" They say no more of their features than other labels do." if bad else ""),
            "warning" if bad else "verdict",
        ),
    )


def _histogram(card: Card) -> Chart:
    # The axis shows every value of x, so three digits.
    centres = [float(f"{(a + b) / 2:.3g}") for a, b in zip(card.edges, card.edges[1:], strict=False)]
    lines = [
        charts.Series(
            f"{spread.label}, {spread.region}",
            tuple(charts.Point(x, n / (sum(spread.counts) or 1)) for x, n in zip(centres, spread.counts, strict=True)),
            "step",
        )
        for spread in card.spreads
    ]
    title = f"{card.feature}, {card.role.role}"
    return Chart(title, lambda: charts.line_chart(lines, x_title="maximum activation", y_title="prompts"))


def _firing(result: Result) -> Table:
    heads = [f"> {spread.label}, {spread.region}" for spread in result.cards[0].spreads] if result.cards else []
    rows = [(str(card.feature), card.role.role, *(spread.fires for spread in card.spreads)) for card in result.cards]
    return Table.of("Share of prompts in which a feature fires", ["feature", "role", *heads], rows)


def _examples(card: Card) -> Table:
    rows = [(fmt.measure(e.activation), fmt.token_text(e.token), e.label, e.prompt) for e in card.examples]
    title = f"{card.feature}, {card.role.role}"
    return Table.of(title, "> activation | token | class | prompt", rows, folded=True)


STUDY = Study("features", Config, Result, run, sections)
