"""The guard: a harm probe and a refusal probe of one model, with thresholds, explanations and a card, in one folder.

`guard.json` holds everything that is not an array, and the SHA-256 of the other files; `guard.safetensors` the arrays;
`README.md` the card. Nothing is pickled. The dense probes detect; SAE features explain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch

from demur.errors import InputError
from demur.guard.probes import Probe
from demur.guard.readings import Reader
from demur.guard.streaming import Stream, Watch, watched
from demur.model import Batch, ChatModel, Progress, Region, Residuals
from demur.saes import Rows
from demur.stats import Estimate
from demur.types import FeatureField, FeatureId, Prompt, Value, by_layer

Verdicts = Literal["harmless", "refused", "jailbreak", "over-refusal"]
Axis = Literal["harmful", "refuse"]
REFUSING = 0.5
"""The model is expected to refuse where the probability is above this, if the guard has no threshold of its own."""
DEFAULT_FPR = 0.01
_SAMPLED = 257
"""Values of each weight that go into a model's fingerprint."""


class ModelName(Value):
    """Which model a guard belongs to. Two models are the same where their fingerprints are."""

    name: str
    revision: str
    """Commit on the hub; empty for a local folder."""
    fingerprint: str
    """SHA-256, hex, of all weights' names and shapes, some values of each, the chat template and the system message."""

    @classmethod
    def of(cls, model: ChatModel) -> Self:
        """The name of a loaded model. A few hundred values of each weight are read, at bfloat16's precision so that the
        dtype in which a model is loaded does not matter."""
        state = hashlib.sha256()
        for name, weight in model.hf.named_parameters():
            flat = weight.detach().reshape(-1)
            places = torch.linspace(0, len(flat) - 1, min(_SAMPLED, len(flat)), dtype=torch.float64).long()
            values = flat[places.to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16)
            state.update(f"{name} {tuple(weight.shape)}".encode() + values.numpy().tobytes())
        # The template and the system message, as a prompt is rendered with them.
        state.update(model.chat.text("x")[0].encode())
        folder = Path(model.name)
        commit = str(getattr(model.hf.config, "_commit_hash", None) or "")
        local = folder.is_dir()
        return cls(
            name="/".join(folder.resolve().parts[-2:]) if local else model.name,
            revision="" if local else commit,
            fingerprint=state.hexdigest(),
        )

    def __str__(self) -> str:
        at = f" at revision {self.revision}" if self.revision else ""
        return f"{self.name}{at} (weights {self.fingerprint[:12]})"


class SaeName(Value):
    """Which SAEs the features are of: source, and the key of their content."""

    source: str
    identity: str
    revision: str = ""


class OperatingPoint(Value):
    """What was measured at a threshold: the share of a set of test prompts (or answers) that was flagged."""

    detector: Literal["harmful", "refuse", "jailbreak", "stream"]
    prompts: str
    """What they are: an attack, a benign set."""
    positive: bool
    """They should be flagged."""
    fpr: float
    """False-positive rate on the validation prompts at which the threshold was set."""
    flagged: Estimate


class GuardScore(Value):
    """What the guard says of one prompt: the calibrated chances that it is harmful and that the model refuses it.
    `flagged`: harmful at the guard's threshold."""

    harmful: float
    refuse: float
    flagged: bool
    verdict: Verdicts
    """"harmless"; "refused": harmful, and the model refuses; "jailbreak": harmful, and it does not; "over-refusal": it
    refuses though harmless."""


class ExplainedToken(Value):
    """A token of the prompt, and how active harm and refusal features are on it: 1 is their mean maximum over refused
    harmful prompts. Tokens of the template's header are 0."""

    text: str
    harm: float
    refusal: float


class ExplainedFeature(Value):
    """A feature's activation on the prompt, and the log-odds that it adds to the explaining (sparse) probe."""

    feature: FeatureField
    role: Literal["harm", "refusal"]
    activation: float
    adds: float


class Explanation(Value):
    """A prompt's score, and what in it the features saw. The features explain; the score is the detecting probes'.
    `sparse` are the chances that the two explaining probes give, harmful and refuse, for comparison."""

    score: GuardScore
    tokens: tuple[ExplainedToken, ...]
    features: tuple[ExplainedFeature, ...]
    """Those that add or take away most, first."""
    sparse: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Sparse:
    """The explanation: a probe on harm features and one on refusal features, and the features' encoder rows."""

    harm: Probe
    refusal: Probe
    reference: Mapping[FeatureId, float]
    """Mean maximum activation on refused harmful prompts."""


@dataclass(frozen=True, eq=False)
class Guard:
    """Scores prompts, and answers while they are written, for the one model that it was fitted on.

    `thresholds` are probabilities by axis and by false-positive rate on validation negatives: `thresholds["harmful"]`
    is `{"0.01": t, …}`. `fpr` says which of them flags. `thresholds["refusing"]` is `{"0.95": t}`: 95 % of the
    validation prompts that the model refused are above it. `rows` are encoder rows of the features that are read.
    """

    model: ChatModel
    harm: Probe
    refuse: Probe
    thresholds: Mapping[str, Mapping[str, float]]
    sparse: Sparse | None = None
    rows: Mapping[int, Rows] = field(default_factory=dict[int, Rows])
    stream: Stream | None = None
    saes: SaeName | None = None
    points: tuple[OperatingPoint, ...] = ()
    fpr: float = DEFAULT_FPR
    version: str = ""
    """Of demur, when the guard was fitted."""

    def __post_init__(self) -> None:
        if f"{self.fpr:g}" not in self.thresholds.get("harmful", {}):
            known = ", ".join(self.thresholds.get("harmful", {})) or "none"
            raise InputError(f"the guard has no threshold for a false-positive rate of {self.fpr:g}; it has {known}")

    def at(self, fpr: float) -> Guard:
        """The same guard with its threshold at another false-positive rate. Raises InputError: it has none there."""
        return replace(self, fpr=fpr)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that scoring reads; the pass ends after the last one."""
        return self._scoring.layers

    @property
    def threshold(self) -> float:
        """Probability of harm above which a prompt is flagged."""
        return self.thresholds["harmful"][f"{self.fpr:g}"]

    @property
    def refusing(self) -> float:
        """Probability of refusal above which the model is expected to refuse as it does plain requests."""
        return self.thresholds.get("refusing", {}).get("0.95", REFUSING)

    @cached_property
    def _scoring(self) -> Reader:
        return Reader(self.model, (self.harm.reading, self.refuse.reading), self.rows)

    def score(self, prompts: Iterable[Prompt | str], progress: Progress = None) -> list[GuardScore]:
        """A score for each prompt, in their order, from one pass that ends after the deepest layer that is needed.
        Interventions that are open act. Raises InputError: a prompt does not fit the model's context."""
        harm, refuse = self._scoring.read(prompts, progress)
        return self._scores(harm, refuse)

    def score_batch(self, batch: Batch) -> list[GuardScore]:
        """The same for one batch of conversations, row by row."""
        return self.score_residuals(self.model.residuals(batch, self.layers), batch)

    def score_residuals(self, residuals: Residuals, batch: Batch) -> list[GuardScore]:
        """The same from residuals of a batch that are at hand, at least those of `layers`."""
        readings = (self.harm.reading, self.refuse.reading)
        with torch.no_grad():
            harm, refuse = (self._scoring.of(residuals, batch, each).cpu().numpy() for each in readings)
        return self._scores(harm, refuse)

    def _scores(self, harm: np.ndarray, refuse: np.ndarray) -> list[GuardScore]:
        pairs = zip(self.harm.probability(harm).tolist(), self.refuse.probability(refuse).tolist(), strict=True)
        return [self._score(*pair) for pair in pairs]

    def _score(self, harmful: float, refuse: float) -> GuardScore:
        flagged = harmful > self.threshold
        return GuardScore(
            harmful=harmful, refuse=refuse, flagged=flagged, verdict=verdict_of(flagged, refuse > self.refusing)
        )

    def explain(self, prompt: Prompt | str, top: int = 10) -> Explanation:
        """Why: the activity of harm and refusal features at each token, and the features that add most. Raises
        InputError: the guard has no features (it was fitted without SAEs)."""
        if self.sparse is None:
            raise InputError("this guard has no features to explain with; fit one from a run with SAEs")
        probes = (self.sparse.harm, self.sparse.refusal)
        features = tuple(dict.fromkeys(f for probe in probes for f in probe.reading.features))
        readings = (self.harm.reading, self.refuse.reading, *(probe.reading for probe in probes))
        reader = Reader(self.model, readings, self.rows)
        (item,) = self.model.tokenize([prompt])
        batch = self.model.batch([item])
        residuals = self.model.residuals(batch, reader.layers)
        with torch.no_grad():
            harm, refuse, *values = (reader.of(residuals, batch, each).cpu().numpy() for each in readings)
            levels = self._levels(residuals, features, np.array(item.regions))
        column = {feature: n for n, feature in enumerate(features)}
        groups = [probe.reading.features for probe in probes]
        whole = [sum(self.sparse.reference[f] for f in group) or 1.0 for group in groups]
        shares = [levels[:, [column[f] for f in g]].sum(1) / total for g, total in zip(groups, whole, strict=True)]
        tokens = tuple(
            ExplainedToken(text=str(self.model.tokenizer.decode([token])), harm=float(a), refusal=float(b))
            for token, a, b in zip(item.ids, *shares, strict=True)
        )
        added = [
            ExplainedFeature(feature=f, role=role, activation=float(v), adds=float(v * w))
            for role, probe, (row,) in zip(("harm", "refusal"), probes, values, strict=True)
            for f, v, w in zip(probe.reading.features, row, probe.weights, strict=True)
        ]
        first, second = (float(probe.probability(read)[0]) for probe, read in zip(probes, values, strict=True))
        return Explanation(
            score=self._scores(harm, refuse)[0],
            tokens=tokens,
            features=tuple(sorted(added, key=lambda each: -abs(each.adds))[:top]),
            sparse=(first, second),
        )

    def _levels(
        self, residuals: Mapping[int, torch.Tensor], features: tuple[FeatureId, ...], regions: np.ndarray
    ) -> np.ndarray:
        """Activations at every token of the only row, shape (token, feature); 0 on header and BOS."""
        found = np.zeros((len(regions), len(features)))
        place = {feature: n for n, feature in enumerate(features)}
        for layer, indices in by_layer(features).items():
            rows = self.rows[layer]
            values = rows.to(residuals[layer].device).encode(residuals[layer])[0].float().cpu().numpy()
            for index in indices:
                found[:, place[FeatureId(layer, index)]] = values[:, rows.indices.index(index)]
        found[regions < Region.INSTRUCTION] = 0.0
        return found

    def watch(self, batch: Batch) -> AbstractContextManager[Watch]:
        """Watch the answers to a batch while they are written, as `ChatModel.generate(…, guard=guard)` does: the same
        pass, no second one. Raises InputError: the guard has no streaming probe."""
        if self.stream is None:
            raise InputError(
                "this guard has no streaming probe, so it cannot watch answers; fit one of a run with --streaming"
            )
        return watched(self.model, self.stream, batch)

    def save(self, folder: str | Path) -> Path:
        """Write the guard into a folder (made if missing; a guard that is there is replaced) and return it. Raises
        InputError: the folder holds something else, or cannot be written."""
        from demur.guard.files import save_guard

        return save_guard(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, model: ChatModel, *, fpr: float = DEFAULT_FPR) -> Guard:
        """Read a guard that belongs to `model`. Raises InputError: a file is missing, cut or changed (named), it is the
        guard of another model (both are named), or there is no threshold at `fpr`."""
        from demur.guard.files import load_guard

        return load_guard(Path(folder), model, fpr)


def verdict_of(harmful: bool, refusing: bool) -> Verdicts:
    """The two axes as one word."""
    if harmful:
        return "refused" if refusing else "jailbreak"
    return "over-refusal" if refusing else "harmless"
