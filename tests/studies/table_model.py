"""A context without a model: what becomes of a prompt under a change is a rule, given by the test.

Stages are kept in memory by their whole key, so a key that lacks what its value depends on gives a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from demur.method.attribution import Attribution
from demur.method.direction import Direction
from demur.method.interventions import HoldFeatures, PerPrompt, ScaleFeatures
from demur.studies.context import Context, JudgedAnswers
from demur.studies.pipeline import CleanAnswers, Found
from demur.types import Answer, FeatureId, FeatureSet, Outcome, Prompt, PromptSet, RefusalToken, Split, Splits, Verdict

ABLATED = "direction ablated"


def numbered(name: str, n: int, label: Any = "harmful") -> PromptSet:
    """Prompts `name0`, `name1`, ..."""
    made = tuple(Prompt(id=f"{name}{k}", text=f"{name} {k}", label=label) for k in range(n))
    return PromptSet(name=name, prompts=made)


def splits_of(direction: int = 2, selection: int = 2, tuning: int = 2, test: int = 3) -> Splits:
    """So many prompts of each class: `test0`, ... and the harmless `+test0`, ..."""
    sizes = {"direction": direction, "selection": selection, "tuning": tuning, "test": test}
    made: dict[str, Any] = {
        name: Split(harmful=numbered(name, n), harmless=numbered(f"+{name}", n, "harmless"))
        for name, n in sizes.items()
    }
    return Splits(**made)


def features_of(*features: FeatureId, method: str = "F*") -> FeatureSet:
    """Scored by their order, the first highest."""
    scores = tuple(float(n) for n in range(len(features), 0, -1))
    return FeatureSet(features=features, scores=scores, scope="global", method=method)


def bare(kind: Any, **given: Any) -> Any:
    """A value of a class, of which only some fields, properties and methods are asked for."""
    own = {name: staticmethod(value) if callable(value) else value for name, value in given.items()}
    return object.__new__(type(kind.__name__, (kind,), own))


class Done:
    """What a change does to one prompt."""

    def __init__(self, prompt: Prompt, change: Sequence[Any]) -> None:
        self.prompt, self.ablated = prompt, ABLATED in change
        self.scaled: dict[FeatureId, float] = {}
        self.held: dict[FeatureId, Any] = {}
        self.kinds: list[str] = []
        for each in change:
            for one in each.by_prompt[prompt.id] if isinstance(each, PerPrompt) else (each,):
                self.kinds.append(type(one).__name__)
                if isinstance(one, ScaleFeatures):
                    self.scaled |= dict.fromkeys(one.features, one.factor)
                if isinstance(one, HoldFeatures):
                    self.held |= dict(zip(one.features, one.values.T.tolist(), strict=True))


Rule = Callable[[Done], float]


class Stage:
    """Rows in memory."""

    def __init__(self, kept: list[Any]) -> None:
        self.kept, self.done = kept, False

    def rows(self, _name: str, _kind: Any) -> list[Any]:
        return list(self.kept)

    def append(self, _name: str, row: Any) -> None:
        self.kept.append(row)

    def finish(self) -> None:
        assert not self.done
        self.done = True


def in_order(tasks: Any) -> list[Any]:
    """What tasks give, where no other process does any."""
    return [task() for task in tasks]


class Kept:
    """Values in memory, by all that they depend on."""

    stages: dict[str, Any]

    def cached(self, name: str, depends: dict[str, Any], kind: Any, compute: Any, label: str = "") -> Any:  # noqa: ARG002
        assert kind is not None
        key = f"{name} {depends!r}"
        if key not in self.stages:
            self.stages[key] = compute()
        return self.stages[key]


class TableModel(Kept, Context[Any]):
    """Refusal log-odds are a rule of what is done to a prompt; above 0 it is refused, and a rule that gives nan leaves
    the answer unscored."""

    model: Any = None
    suite: Any = None
    splits: Any = None
    inputs: Any = None
    depends: Any = None

    def __init__(self, rule: Rule, config: Any, splits: Any = None) -> None:
        self.rule, self.config, self.splits = rule, config, splits
        self.seconds, self.warnings, self.depends = {}, [], {}
        self.stages: dict[str, Any] = {}
        self.asked: list[str] = []
        self.told: list[tuple[str, int, int]] = []
        self.saved: dict[str, str] = {}
        self.open: Any = ()
        self.progress = lambda *told: self.told.append(told)
        self.run: Any = SimpleNamespace(
            stage=lambda name, depends: self.stages.setdefault(f"{name} {depends!r}", Stage([])),
            alone=lambda _stage: nullcontext(),
            each=in_order,
            save_result=self.saved.__setitem__,
            folder=None,
        )
        self.model: Any = SimpleNamespace(
            tokenize=lambda prompts: [SimpleNamespace(prompt=p, prompt_id=p.id, ids=(7, 8)) for p in prompts],
            in_float32=nullcontext,
            intervene=self._intervene,
            n_layers=4,
        )

    @contextmanager
    def _intervene(self, change: Any) -> Iterator[None]:
        self.open, before = change, self.open
        yield
        self.open = before

    def odds(self, prompts: Any, change: Any) -> np.ndarray:
        """Of prompts, or of what `model.tokenize` makes of them."""
        return np.array([self.rule(Done(getattr(each, "prompt", each), change)) for each in prompts])

    def answer(self, label: str, prompts: PromptSet, change: Any = ()) -> JudgedAnswers:
        self.asked.append(label)
        answers = tuple(Answer(prompt=prompt, text=f"{label}: {prompt.id}") for prompt in prompts)
        told = [None if np.isnan(o) else YES if o <= 0 else NO for o in self.odds(prompts, change)]
        return JudgedAnswers(answers, tuple(Verdict(outcome=each, judge="rule") for each in told))

    def watch_coherence(self, clean: Any) -> None:
        self.watched = [answer.prompt.id for answer in clean]

    def under(self, change: Any) -> dict[str, Any]:
        return {"change": change}

    def found(self, chosen: FeatureSet, ids: tuple[int, ...] = (1,), **given: Any) -> Found:
        """F*, and the clean model's answers to the splits that choose."""
        answers = {
            purpose: (self.answer("", split.harmful), self.answer("", split.harmless))
            for purpose, split in self.splits.choosing
        }
        tokens = tuple(RefusalToken(token_id=each, text=f"<{each}>", share=1.0) for each in ids)
        direction = bare(Direction, ablate=lambda: ABLATED, difference=torch.ones(1))
        clean = bare(CleanAnswers, answers=answers, tokens=tokens)
        kept = {"clean": clean, "chosen": chosen, "direction": direction, "attribution": bare(Attribution)}
        return bare(Found, **(kept | given))


YES, NO = Outcome.COMPLIANCE, Outcome.REFUSAL


def use(monkeypatch: pytest.MonkeyPatch, work: TableModel, found: Found) -> None:
    """Let studies find `found`, and read log-odds by the rule."""

    def first(model: Any, items: Any, ids: Any, change: Any) -> Any:
        assert model is work.model
        assert tuple(ids) == found.clean.refusal_ids
        return SimpleNamespace(log_odds=torch.tensor(work.odds(items, change)))

    def find(context: Any, prompts: Any) -> Found:
        assert context is work
        assert prompts == work.splits.choosing
        return found

    def compiled(model: Any, suite: Any, change: Any) -> Any:
        assert model is work.model
        assert suite is work.suite
        return change

    monkeypatch.setattr("demur.studies.pipeline.find", find)
    monkeypatch.setattr("demur.method.interventions.Compiled", compiled)
    monkeypatch.setattr("demur.method.interventions.bind", lambda _suite, *change: change)
    monkeypatch.setattr("demur.method.direction.first_token", first)
