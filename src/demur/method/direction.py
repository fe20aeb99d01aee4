"""The refusal direction: difference in means, and the choice among candidates (Arditi et al., arXiv 2406.11717).

Candidates are the differences between the mean residual on harmful and on harmless prompts, at each post-instruction
position and each layer. A good one (1) stops refusal when it is ablated, (2) brings refusal about when it is added, and
(3) changes nothing else. Scores are read off the first answer token: refusal log-odds `log p(refuse) − log(1 −
p(refuse))` in nats, and the KL divergence of that token's distribution on harmless prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import ModelError
from demur.method.interventions import AblateDirection, AddDirection, Compiled, Intervention, Where
from demur.model import Batch, ChatModel, Items, TokenizedPrompt, resumed
from demur.types import Candidate, Form, RefusalToken, Take, take_all

FORMS: tuple[Form, Form] = ("linear", "affine")


@dataclass(frozen=True)
class Direction:
    """A refusal direction with the means it came from."""

    layer: int
    position: int
    form: Form
    """"linear" ablates to zero, "affine" to the harmless mean."""
    difference: Float[Tensor, " d_model"]
    """Mean on harmful − mean on harmless prompts at `layer` and `position`, float32, not normalised."""
    harmless_mean: Float[Tensor, "layer d_model"]
    """Mean residual of harmless prompts at `position`, for every layer (the affine form's reference)."""
    candidates: tuple[Candidate, ...] = ()
    """All that were scored (empty when layer and position were given)."""
    note: str = ""
    """What had to be relaxed for the choice, if anything."""

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """Unit vector `r`."""
        return self.difference / self.difference.norm()

    def ablate(self, form: Form | None = None) -> AblateDirection:
        """Projects the direction out after every layer: to zero, or to the harmless mean (affine)."""
        reference = self.harmless_mean if (form or self.form) == "affine" else None
        return AblateDirection(self.vector, reference=reference)

    def add(self, coefficient: float = 1.0, where: Where = "all") -> AddDirection:
        """Adds the unnormalised difference after its own layer."""
        return AddDirection(self.difference, self.layer, coefficient, where)

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values to write to a run folder."""
        tensors = {"difference": self.difference, "harmless_mean": self.harmless_mean}
        meta: dict[str, Any] = {"layer": self.layer, "position": self.position, "form": self.form, "note": self.note}
        return tensors, meta | {"candidates": [candidate.model_dump(mode="json") for candidate in self.candidates]}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        values: dict[str, Any] = {**tensors, **meta}
        values["candidates"] = tuple(Candidate.model_validate(each) for each in meta["candidates"])
        return cls(**values)


def find_refusal_tokens(
    model: ChatModel, refusals: Sequence[str], others: Sequence[str] = (), *, min_share: float = 0.05, lift: float = 2.0
) -> tuple[RefusalToken, ...]:
    """First tokens of the model's own refusals, most frequent first. A token counts when at least `min_share` of the
    refusals begin with it, and `lift` times the share of other answers that do (a model may begin everything with the
    same word). Raises ModelError: no first token tells refusals apart."""
    first, other = _first_tokens(model, refusals), _first_tokens(model, others)
    n, m = max(1, first.total()), max(1, other.total())
    shares = {token: count / n for token, count in first.most_common()}
    chosen = {token: share for token, share in shares.items() if share >= max(min_share, lift * other[token] / m)}
    if not chosen:
        raise ModelError(
            f"no first token tells the model's {len(refusals)} refusals from its {len(others)} other answers; the "
            "refusal metric reads the first answer token, so it cannot be used on this model and these prompts"
        )
    return tuple(
        RefusalToken(token_id=token, text=str(model.tokenizer.decode([token])), share=share)
        for token, share in chosen.items()
    )


def _first_tokens(model: ChatModel, texts: Sequence[str]) -> Counter[int]:
    ids = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return Counter(each[0] for each in ids if each)


def refusal_log_odds(logits: Float[Tensor, "batch vocab"], refusal_ids: Sequence[int]) -> Float[Tensor, " batch"]:
    """`log p − log(1 − p)` of the next token being a refusal token, nats."""
    refuse = logits[:, list(refusal_ids)].logsumexp(-1)
    rest = logits.clone()
    rest[:, list(refusal_ids)] = -math.inf
    return refuse - rest.logsumexp(-1)


def position_means(model: ChatModel, items: Items, positions: Sequence[int]) -> Float[Tensor, "layer position d_model"]:
    """Mean residual after each layer at `positions` counted from the end (all negative); summed in float64."""
    means = model.mean_over(items, range(model.n_layers), lambda residual: residual[:, list(positions)])
    return torch.stack([means[layer] for layer in range(model.n_layers)])


def residuals_at(model: ChatModel, items: Items, layer: int, position: int) -> Float[Tensor, "prompt d_model"]:
    """Residual of each prompt after one layer, at `position` counted from the end (negative); float32, on the CPU."""

    def run(batch: Batch) -> list[Tensor]:
        with torch.inference_mode(), model.capture([layer], lambda residual: residual[:, position]) as residuals:
            model.last_logits(batch)
        return list(residuals[layer].float().cpu())

    return torch.stack(model.each(items, run))


def singular_directions(
    harmful: Float[Tensor, "prompt d_model"], harmless_mean: Float[Tensor, " d_model"], k: int
) -> Float[Tensor, "k d_model"]:
    """The `k` directions along which harmful prompts lie furthest from the harmless mean: top right singular vectors of
    the differences, orthonormal. The first is close to the difference in means."""
    return torch.linalg.svd(harmful - harmless_mean, full_matrices=False).Vh[:k]


def cluster_directions(
    harmful: Float[Tensor, "prompt d_model"], harmless_mean: Float[Tensor, " d_model"], k: int, *, seed: int = 0
) -> Float[Tensor, "cluster d_model"]:
    """Differences in means of `k` clusters of harmful prompts (k-means), largest cluster first; with `k` = 1 the usual
    direction. There are fewer where fewer residuals differ. They are what self-organising maps (arXiv 2511.08379)
    refine."""
    from sklearn.cluster import KMeans

    # Prompts that end alike have one residual, but for the rounding of the batches that they were in.
    same = torch.cdist(harmful, harmful) <= 1e-4 * harmful.norm(dim=-1).max()
    k = min(k, int((~same.tril(-1).any(1)).sum()))
    labels = torch.from_numpy(KMeans(n_clusters=k, random_state=seed).fit_predict(harmful.numpy()))
    largest = Counter(labels.tolist()).most_common()
    return torch.stack([harmful[labels == label].mean(0) for label, _ in largest]) - harmless_mean


class FirstToken(NamedTuple):
    """What one run says of the first answer token, per prompt, in nats."""

    log_odds: Float[Tensor, " prompt"]
    kl: Float[Tensor, " prompt"]
    """Divergence from the clean run to this one (zeros when no reference was given)."""


def clean_log_probs(model: ChatModel, items: Items) -> dict[str, Float[Tensor, " vocab"]]:
    """Prompt id → log-probabilities of the first answer token, on the model's device: the reference of the KL."""

    def run(batch: Batch) -> dict[str, Tensor]:
        with torch.inference_mode():
            return dict(zip(batch.prompt_ids, model.last_logits(batch).log_softmax(-1), strict=True))

    return {prompt: row for _, part in model.over_batches(items, run) for prompt, row in part.items()}


class Start(NamedTuple):
    """Where passes may begin that differ only from a layer on: what leaves that layer, on each prompt."""

    layer: int
    residuals: Mapping[str, Float[Tensor, "pos d_model"]]
    """Prompt id → residual before anything is done to this layer's output."""

    @classmethod
    def of(cls, model: ChatModel, items: Items, layer: int, change: Compiled) -> Start:
        """The residuals under a change, of which all that is done before `layer` ends counts."""

        def run(batch: Batch) -> list[Tensor]:
            with torch.inference_mode(), model.capture([layer]) as residuals, change.on(batch):
                model.last_logits(batch)
            return [each[real].cpu() for each, real in zip(residuals[layer], batch.real, strict=True)]

        return cls(layer, dict(zip((item.prompt_id for item in items), model.each(items, run), strict=True)))

    def on(self, model: ChatModel, batch: Batch) -> AbstractContextManager[None]:
        """Skip the layers up to this one, for one batch."""
        output = torch.zeros(*batch.input_ids.shape, model.d_model, dtype=model.dtype)
        output[batch.real.cpu()] = torch.cat([self.residuals[prompt] for prompt in batch.prompt_ids])
        return resumed(model.layers, self.layer, output.to(model.layer_device(self.layer)))


def first_token(
    model: ChatModel,
    items: Items,
    refusal_ids: Sequence[int],
    interventions: Sequence[Intervention] | Compiled = (),
    reference: Mapping[str, Float[Tensor, " vocab"]] | None = None,
    start: Start | None = None,
) -> FirstToken:
    """Refusal log-odds of the first answer token, and its KL from `reference`, under interventions (those on features
    compiled with their SAEs). Reduced to two numbers a prompt where the model runs, so nothing of the vocabulary's size
    is kept. `start` is where the interventions begin to differ from those that it was made under."""
    compiled = interventions if isinstance(interventions, Compiled) else Compiled(model, None, interventions)

    def run(batch: Batch) -> list[list[float]]:
        begun = nullcontext() if start is None else start.on(model, batch)
        with torch.inference_mode(), begun, compiled.on(batch):
            logits = model.last_logits(batch)
            log_odds = refusal_log_odds(logits, refusal_ids)
            kl = torch.zeros_like(log_odds)
            if reference is not None:
                before = torch.stack([reference[prompt] for prompt in batch.prompt_ids])
                kl = (before.exp() * (before - logits.log_softmax(-1))).sum(-1)
            return torch.stack([log_odds, kl], 1).tolist()

    found = torch.tensor(model.each(items, run)).reshape(-1, 2)
    return FirstToken(found[:, 0], found[:, 1])


def post_instruction_positions(items: Iterable[TokenizedPrompt]) -> tuple[int, ...]:
    """Positions, counted from the end, that hold template tokens after the message in every prompt: `(-n, …, -1)`."""
    return tuple(range(-max(1, min(item.n_post_instruction for item in items)), 0))


@dataclass(frozen=True)
class DirectionSearch:
    """How a direction is chosen."""

    forms: tuple[Form, ...] = FORMS
    """Forms of ablation to try."""
    layer: int | None = None
    position: int | None = None
    """`layer` and `position` fix one or both instead of trying all."""
    max_depth: float = 0.8
    """Candidates from layers beyond this fraction of the model are dropped: the direction must still be able to act."""
    kl_threshold: float = 0.1
    """Largest KL (nats) on harmless prompts."""


Prompts = tuple[Items, Items]
"""Harmful and harmless."""
Scores = Callable[[Take], Iterable[Sequence[Candidate]]]
"""Scores the candidates, those of one place at a time, but for those that it is told to leave out."""


@dataclass(frozen=True)
class ClassMeans:
    """Mean residuals of harmful and harmless prompts after each layer, at `positions` counted from the end."""

    positions: tuple[int, ...]
    harmful: Float[Tensor, "layer position d_model"]
    harmless: Float[Tensor, "layer position d_model"]

    @classmethod
    def of(cls, model: ChatModel, train: Prompts, search: DirectionSearch) -> Self:
        """Of the prompts, at the positions that the search names. Raises ModelError: there is no such position."""
        positions = _positions(search, train)
        harmful, harmless = (position_means(model, items, positions) for items in train)
        return cls(positions, harmful, harmless)

    @property
    def difference(self) -> Float[Tensor, "layer position d_model"]:
        """Mean on harmful − mean on harmless prompts."""
        return self.harmful - self.harmless

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values to write to a run folder."""
        return {"harmful": self.harmful, "harmless": self.harmless}, {"positions": list(self.positions)}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        return cls(tuple(meta["positions"]), tensors["harmful"], tensors["harmless"])


def find_direction(
    model: ChatModel,
    train: Prompts | ClassMeans,
    validation: Prompts,
    refusal_ids: Sequence[int],
    search: DirectionSearch | None = None,
    *,
    stored: Callable[[Sequence[str], Scores], Sequence[Candidate]] | None = None,
) -> Direction:
    """Choose the refusal direction. Raises ModelError: the given layer or position does not exist, or harmful and
    harmless means coincide.

    Args:
        model: the chat model.
        train: prompts whose means are taken, or these means.
        validation: prompts on which candidates are scored.
        refusal_ids: the model's refusal tokens.
        search: what to try and what to keep.
        stored: given the names of all candidates and what scores them, gives all of them in that order, those that are
            known already without scoring them again (default: all are scored).
    """
    search = search or DirectionSearch()
    layers = _layers(search, model)
    means = train if isinstance(train, ClassMeans) else ClassMeans.of(model, train, search)
    difference, positions = means.difference, means.positions
    if not torch.isfinite(difference).all():
        raise ModelError("mean residuals are not finite: the weights hold NaN or infinity, or the dtype overflows")
    if float(difference[layers].norm(dim=-1).max()) == 0.0:
        raise ModelError("the mean residuals of harmful and harmless prompts are equal, so there is no direction")
    # Template tokens before any word of the message are the same in all prompts, and nothing separates there.
    places = [(l, n) for l in layers for n in range(len(positions)) if float(difference[l, n].norm()) > 0.0]
    names = [_name(layer, positions[place], form) for layer, place in places for form in search.forms]
    score = partial(_score, model, means, places, validation, refusal_ids, search)
    candidates = tuple(chain(*score(take_all)) if stored is None else stored(names, score))
    chosen, note = choose(candidates)
    place = positions.index(chosen.position)
    vector = difference[chosen.layer, place]
    return Direction(chosen.layer, chosen.position, chosen.form, vector, means.harmless[:, place], candidates, note)


def _name(layer: int, position: int, form: Form) -> str:
    return f"{layer}:{position}:{form}"


def candidate_name(candidate: Candidate) -> str:
    """What `find_direction` calls a candidate."""
    return _name(candidate.layer, candidate.position, candidate.form)


def _layers(search: DirectionSearch, model: ChatModel) -> list[int]:
    if search.layer is None:
        return [layer for layer in range(model.n_layers) if layer < search.max_depth * model.n_layers]
    if not 0 <= search.layer < model.n_layers:
        raise ModelError(
            f"the direction's layer was set to {search.layer}; the model has layers 0…{model.n_layers - 1}"
        )
    return [search.layer]


def _positions(search: DirectionSearch, train: Prompts) -> tuple[int, ...]:
    every = [item for items in train for item in items]
    if search.position is None:
        return post_instruction_positions(every)
    shortest = min(map(len, every))
    if not -shortest <= search.position <= -1:
        raise ModelError(
            f"the direction's position was set to {search.position}; it counts from the prompt's end, so -1 is the "
            f"last token and {-shortest} the first of the shortest prompt"
        )
    return (search.position,)


def _score(
    model: ChatModel,
    means: ClassMeans,
    places: Sequence[tuple[int, int]],
    validation: Prompts,
    refusal_ids: Sequence[int],
    search: DirectionSearch,
    take: Take,
) -> Iterator[list[Candidate]]:
    """The candidates of each place, in all forms."""
    harmful, harmless = validation
    plain: dict[str, Tensor] | None = None
    for layer, place in places:
        vector, position = means.difference[layer, place], means.positions[place]
        if not take([_name(layer, position, form) for form in search.forms]):
            continue
        plain = plain or clean_log_probs(model, harmless)
        induce = float(first_token(model, harmless, refusal_ids, [AddDirection(vector, layer)]).log_odds.mean())
        found: list[Candidate] = []
        for form in search.forms:
            reference = means.harmless[:, place] if form == "affine" else None
            ablation = [AblateDirection(vector, reference=reference)]
            bypass = float(first_token(model, harmful, refusal_ids, ablation).log_odds.mean())
            kl = float(first_token(model, harmless, refusal_ids, ablation, plain).kl.mean())
            kept = kl <= search.kl_threshold and induce > 0
            found.append(
                Candidate(layer=layer, position=position, form=form, bypass=bypass, induce=induce, kl=kl, kept=kept)
            )
        yield found


def choose(candidates: Sequence[Candidate]) -> tuple[Candidate, str]:
    """The candidate with the best bypass among those that meet all conditions, and what was relaxed if none does.
    Raises ModelError: no candidate's scores are finite."""
    relaxations: tuple[tuple[Callable[[Candidate], bool], str], ...] = (
        (lambda c: c.kept, ""),
        (lambda c: c.induce > 0, "no candidate met the KL threshold; the best that induces refusal was taken"),
        (lambda _: True, "no candidate induces refusal when added; the best at bypassing was taken"),
    )
    for condition, note in relaxations:
        left = [c for c in candidates if condition(c) and math.isfinite(c.bypass)]
        if left:
            return min(left, key=lambda c: (c.bypass, c.layer, c.position, c.form)), note
    raise ModelError("every candidate direction gave logits that are not finite; try --dtype float32")
