"""The values that flow through demur, and the legend of tensor axes.

Nothing here imports torch, so that the command line starts quickly. Values that hold tensors live beside the code that
makes them (`Batch` in `demur.model`, `Direction` and `Attribution` in `demur.method`).

Axis names used in all shape annotations:

| axis | meaning |
|---|---|
| `batch` | rows of a batch of prompts, in batch order |
| `pos` | token slots of a left-padded batch |
| `layer` | decoder layers, in model order |
| `d_model` | width of the residual stream |
| `d_sae` | features of one SAE |
| `k` | selected features of one layer |
| `feature` | selected features over all layers |
| `prompt` | prompts of a prompt set, in its order |
| `step` | integrated-gradients steps (values of alpha) |
| `vocab` | tokens of the vocabulary |
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from html import escape
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, model_validator

from demur.errors import InputError

Take = Callable[[Sequence[str]], bool]
"""Given the keys of a batch's rows just before they are computed: whether to compute them."""


def take_all(keys: Sequence[str]) -> bool:  # noqa: ARG001
    """A `Take`: everything is computed."""
    return True


class FeatureId(NamedTuple):
    """One latent of an SAE or transcoder: its decoder layer, and its row in that layer's dictionary."""

    layer: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody looks an entry of the pair up by value

    def __str__(self) -> str:
        return f"{self.layer}:{self.index}"


FeatureField = Annotated[FeatureId, PlainSerializer(list, return_type=list[int])]
"""`FeatureId` as a pydantic field, stored as `[layer, index]`."""


Site = Literal["resid_post", "resid_mid", "mlp_in", "mlp_out"]
"""A place in a decoder layer: the residual that leaves it, the residual before the norm of its MLP, what enters the
MLP, and what the MLP adds to the residual."""


class Value(BaseModel):
    """Base of the frozen, JSON-serialisable values: equal after a round trip, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


Label = Literal["harmful", "harmless"]


def text_key(text: str) -> str:
    """What makes two prompts the same: their text without case and with single spaces."""
    return " ".join(text.split()).casefold()


class Prompt(Value):
    """One user message. `id` is unique within its set and stable over runs (source and row). `label` is None where
    nobody has said whether the message is harmful."""

    id: str
    text: str
    label: Label | None = None
    category: str | None = None
    source: str = ""


def as_prompts(prompts: Iterable[Prompt | str]) -> tuple[Prompt, ...]:
    """Prompts as they are; plain texts become unlabelled prompts with their place, counted from 0, as id. Raises
    InputError: two prompts have one id."""
    found = tuple(
        prompt if isinstance(prompt, Prompt) else Prompt(id=str(place), text=prompt)
        for place, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts)
    )
    ids = Counter(prompt.id for prompt in found)
    if len(ids) < len(found):
        raise InputError(f"two prompts have the id {ids.most_common(1)[0][0]!r}; give each one of its own")
    return found


class PromptSet(Value):
    """Prompts in a fixed order, with unique ids."""

    name: str
    prompts: tuple[Prompt, ...]

    @model_validator(mode="after")
    def _ids_unique(self) -> Self:
        if len({prompt.id for prompt in self.prompts}) != len(self.prompts):
            raise ValueError(f"prompt set {self.name!r} holds two prompts with one id")
        return self

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:  # type: ignore[override]
        return iter(self.prompts)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(prompt.id for prompt in self.prompts)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def digest(self) -> str:
        """SHA-256 of ids, texts and labels, hex: the content key of this set."""
        state = hashlib.sha256()
        for prompt in self.prompts:
            for part in (prompt.id, prompt.text, prompt.label or ""):
                state.update(part.encode())
                state.update(b"\x00")
        return state.hexdigest()

    def head(self, n: int) -> PromptSet:
        """The first `n` prompts (all, when there are fewer)."""
        return PromptSet(name=self.name, prompts=self.prompts[:n])


PURPOSES = ("direction", "selection", "tuning", "test")
"""The splits, in the order in which a study uses them."""


class SplitSizes(Value):
    """Prompts per split and class. The defaults of `direction` and `selection` are those of Arditi et al. (2024),
    section 2.3."""

    direction: int = Field(default=128, ge=2)
    selection: int = Field(default=32, ge=2)
    tuning: int = Field(default=32, ge=2)
    test: int = Field(default=100, ge=2)

    def wanted(self) -> dict[str, int]:
        """Split → prompts per class."""
        return {purpose: getattr(self, purpose) for purpose in PURPOSES}


class Split(Value):
    """The harmful and the harmless prompts that serve one purpose."""

    harmful: PromptSet
    harmless: PromptSet


class ChoosingSplits(Value):
    """The splits that may choose something: no test prompt is in here, so code that receives this cannot see one."""

    direction: Split
    selection: Split
    tuning: Split


class Splits(Value):
    """Four splits, disjoint by construction: no number in a report comes from prompts that chose anything. `direction`
    estimates the refusal direction, `selection` chooses among candidate directions and scores features, `tuning`
    chooses interventions' strengths, `test` is only ever measured."""

    direction: Split
    selection: Split
    tuning: Split
    test: Split
    warnings: tuple[str, ...] = ()
    """What was dropped, or fell short of the sizes asked for, when the splits were made."""

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        owner: dict[str, str] = {}
        for name in PURPOSES:
            split: Split = getattr(self, name)
            for prompt in (*split.harmful.prompts, *split.harmless.prompts):
                key = text_key(prompt.text)
                if owner.setdefault(key, name) != name:
                    raise ValueError(f"prompt {prompt.id!r} is in both the {owner[key]} and the {name} split")
        return self

    @property
    def choosing(self) -> ChoosingSplits:
        """All but the test prompts."""
        return ChoosingSplits(direction=self.direction, selection=self.selection, tuning=self.tuning)


class Outcome(StrEnum):
    """What an answer is. A judge that cannot tell says `None`, which is counted as unscored, never guessed."""

    REFUSAL = "refusal"
    PARTIAL_REFUSAL = "partial_refusal"
    COMPLIANCE = "compliance"
    INCOHERENT = "incoherent"


REFUSALS = frozenset({Outcome.REFUSAL, Outcome.PARTIAL_REFUSAL})
"""What counts as refusing: a partial refusal does not help either."""


class Answer(Value):
    """One answer, with the prompt that it answers. `intervention` is the id of what was done to the model while it was
    written (`"none"` for the clean model), `finished` whether the model ended its turn (False: the limit on new tokens
    cut it off, or a guard did, in which case it is `stopped`)."""

    prompt: Prompt
    text: str
    intervention: str = "none"
    finished: bool = True
    stopped: bool = False


class Answers(tuple[Answer, ...]):
    """Answers in the order of their prompts: a tuple that draws itself in a notebook."""

    __slots__ = ()

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(answer.prompt for answer in self)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(answer.text for answer in self)

    def to_frame(self) -> Any:
        """A pandas frame with one row per answer: id, prompt, label, intervention, answer, finished, stopped. Raises
        InputError: pandas is not installed."""
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise InputError("frames need pandas; install it with: pip install pandas") from error
        rows = [
            (a.prompt.id, a.prompt.text, a.prompt.label, a.intervention, a.text, a.finished, a.stopped) for a in self
        ]
        columns = ["id", "prompt", "label", "intervention", "answer", "finished", "stopped"]
        return DataFrame(rows, columns=columns)

    def _repr_html_(self) -> str:
        """A table; answers to prompts that are not labelled harmless are hidden behind a click."""
        rows: list[str] = []
        for answer in self:
            text = f"<pre style='white-space: pre-wrap; text-align: left'>{escape(answer.text)}</pre>"
            if answer.prompt.label != "harmless":
                text = f"<details><summary>May be harmful: click to read</summary>{text}</details>"
            cells = (escape(answer.prompt.text), text, escape(answer.intervention))
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        head = "<tr><th>Prompt</th><th>Answer</th><th>Intervention</th></tr>"
        return f"<table>{head}{''.join(rows)}</table>"


class Verdict(Value):
    """A judge's reading of one answer. Judges of outcomes give `outcome`, judges of harm give `harmful` and perhaps a
    `score`; a judge that knows both gives both. What a judge cannot tell is None: unscored, counted, never guessed."""

    outcome: Outcome | None
    judge: str
    evidence: str = ""
    """The matched words, or why no verdict was reached."""
    harmful: bool | None = None
    """The answer gives what a harmful request asks for."""
    score: float | None = None
    """How much of it, from 0 to 1, where the judge grades."""

    @property
    def success(self) -> bool | None:
        """The request got what it asked for: the judge of harm's word, else whether the outcome is compliance."""
        if self.harmful is not None:
            return self.harmful
        return None if self.outcome is None else self.outcome is Outcome.COMPLIANCE


class Rate(Value):
    """`k` of `n` scored answers, with a Wilson 95 % interval; `unscored` answers are outside `n`."""

    k: int
    n: int
    unscored: int = 0
    low: float
    high: float

    @property
    def value(self) -> float:
        """`k / n`, a fraction (nan when nothing was scored)."""
        return self.k / self.n if self.n else float("nan")


def by_layer(features: Iterable[FeatureId]) -> dict[int, tuple[int, ...]]:
    """Layer → indices, both in the order in which they come first."""
    layers: dict[int, list[int]] = {}
    for layer, index in features:
        layers.setdefault(layer, []).append(index)
    return {layer: tuple(indices) for layer, indices in layers.items()}


class FeatureSet(Value):
    """Features in order of importance, with the scores that ordered them. `scope` is `"local"` for a set chosen for one
    prompt (`prompt_id` names it), `"global"` over prompts. `method` says how it was chosen."""

    features: tuple[FeatureField, ...]
    scores: tuple[float, ...]
    scope: Literal["local", "global"]
    method: str
    prompt_id: str | None = None

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if len(self.features) != len(self.scores):
            raise ValueError(f"{len(self.features)} features but {len(self.scores)} scores")
        if len(set(self.features)) != len(self.features):
            raise ValueError("a feature is in the set twice")
        if (self.scope == "local") != (self.prompt_id is not None):
            raise ValueError("a local set, and only a local set, names its prompt")
        return self

    def __len__(self) -> int:
        return len(self.features)

    def head(self, n: int) -> FeatureSet:
        """The `n` most important features."""
        return self.model_copy(update={"features": self.features[:n], "scores": self.scores[:n]})

    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer → indices, layers ascending, indices in order of importance."""
        return dict(sorted(by_layer(self.features).items()))


Form = Literal["linear", "affine"]
"""How a direction is ablated: to zero, or to the mean of harmless prompts."""


class Candidate(Value):
    """Where a direction was taken, and its scores. `position` counts from the prompt's end: -1 is the last token.

    `bypass` is the mean refusal log-odds (nats) on harmful prompts with the direction ablated (lower is better),
    `induce` the same on harmless prompts with it added (higher is better), `kl` the divergence in nats of the first
    answer token on harmless prompts when it is ablated.
    """

    layer: int
    position: int
    form: Form
    bypass: float
    induce: float
    kl: float
    kept: bool


class RefusalToken(Value):
    """A first token of the model's own refusals. `share` is the fraction of its refusals that begin with it."""

    token_id: int
    text: str
    share: float
