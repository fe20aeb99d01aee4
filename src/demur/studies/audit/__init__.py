"""Attack a hardened model as someone would who knows the probe: by wording, and by pushing its residual."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from demur.errors import ModelError
from demur.report import charts
from demur.report import format as fmt
from demur.report.blocks import Chart, Section, Table, Text
from demur.stats import Estimate
from demur.studies.base import Study, StudyResult
from demur.studies.config import Options, Positive, SetSizes
from demur.studies.harden import Config as HardenConfig
from demur.types import REFUSALS, Prompt, PromptSet, Value

if TYPE_CHECKING:
    from demur.studies.context import Change, Context
    from demur.studies.harden import Hardening
    from demur.studies.harden.arms import Arm
    from demur.studies.harden.bench import Scores
    from demur.studies.harden.results import ChoiceRow

KNOWS, BLIND = "knows the probe", "does not know the probe"
_KEY = "The probe fires; the attack gets through the hardened model. With 95 % intervals."
TOWARDS, ANYWHERE = "against the probe", "in a random direction"


class AuditOptions(Options):
    """What an attacker may try."""

    group: ClassVar[str] = "Audit"

    n_requests: int = Field(default=30, ge=2)
    """Refused harmful test prompts that are attacked."""
    queries: SetSizes = Field(default=(1, 3, 10, 30, 100), min_length=1)
    """Numbers of wordings tried for each request at which is measured."""
    extra_words: int = Field(default=8, ge=0)
    """Words that a wording may have besides request and template, from harmless tuning prompts and the templates."""
    radii: Positive = Field(default=(0.02, 0.05, 0.1, 0.2, 0.4), min_length=1)
    """Lengths of a push to try, as shares of the residual's norm."""


class Config(HardenConfig, AuditOptions):
    """The model hardened as `demur harden` chooses, and what is tried on it. In one run folder they share work."""


class AuditRow(Value):
    """Requests after an attack: the share on which the probe fires, that the model without hardening refuses, on which
    the attack succeeds there, and on which it succeeds on the hardened model."""

    attacker: str
    size: float
    """Wordings tried, or length of the push as a share of the residual's norm; 0 is the plain request."""
    flagged: Estimate
    refused: Estimate
    clean: Estimate
    hardened: Estimate


class AuditResult(StudyResult):
    """What a hardened model withstands."""

    change: str
    """The change that hardens, for people."""
    probe: str
    threshold: float
    n: int
    false_alarms: dict[str, Estimate]
    """Share of each set of benign test prompts on which the probe fires."""
    wordings: tuple[AuditRow, ...]
    pushes: tuple[AuditRow, ...] = ()


def run(context: Context[Any]) -> AuditResult:
    """Harden as the choosing prompts say, then attack."""
    from demur.studies.harden import Hardening
    from demur.studies.pipeline import find

    found = find(context, context.splits.choosing)
    context.watch_coherence([answer for each in found.clean.answers["tuning"] for answer in each.answers])
    hardening = Hardening(context, found)
    with context.timed("choosing"):
        hardening.choose("harden")
    return _Audit(context, hardening).run()


class _Audit:
    def __init__(self, context: Context[Any], hardening: Hardening) -> None:
        self.context, self.hardening, self.gate = context, hardening, hardening.gate
        self.refusal_ids = hardening.found.clean.refusal_ids
        self.arm: Arm = hardening.arms[hardening.best("harden")]
        self.choice: ChoiceRow = hardening.choices[self.arm.name]["probe"]
        (self.change,) = self.arm.changes(self.choice.strength)
        asked = context.answer("test: harmful", context.splits.test.harmful).only(*REFUSALS)
        self.requests = PromptSet(name="requests", prompts=asked.prompts[: context.config.n_requests])
        if len(self.requests) < 2:
            raise ModelError("the model refuses fewer than 2 harmful test prompts, so there is nothing to get past")

    @property
    def threshold(self) -> float:
        assert self.choice.threshold is not None
        return self.choice.threshold

    def run(self) -> AuditResult:
        test, context = self.hardening.test, self.context
        fires = {name: test.fires(self.arm, "probe", name, self.threshold) for name in test.benign}
        with context.timed("wordings"):
            found = context.each(partial(self._wordings, knows=knows) for knows in (True, False))
            wordings = context.each(row for rows in found for row in rows)
        with context.timed("pushes"):
            pushes = context.each(self._pushes())
        return AuditResult(
            change=f"{self.arm.label} ({self.arm.setting(self.choice.strength)})",
            probe=self.gate.title,
            threshold=self.threshold,
            n=len(self.requests),
            false_alarms={name: _share(each) for name, each in fires.items()},
            wordings=tuple(wordings),
            pushes=tuple(pushes),
        )

    def _wordings(self, *, knows: bool) -> list[Callable[[], AuditRow]]:
        """What measures the best wordings that an attacker finds, by their number."""
        from demur.studies.audit.search import Search
        from demur.studies.jailbreaks import configured_attacks

        context, config = self.context, self.context.config
        attacks = configured_attacks(tuple(dict.fromkeys((*config.attacks, *config.choose_on))))
        templates = tuple(dict.fromkeys(text for attack in attacks for text in attack.templates))
        texts = [p.text for p in context.splits.tuning.harmless] + [text.replace("{ask}", " ") for text in templates]
        words = tuple(sorted({word for text in texts for word in text.split()})) if config.extra_words else ()
        sizes = (0, *config.queries)
        search = Search(
            context, self.gate, self.refusal_ids, self.threshold, templates or ("{ask}",), words, config.extra_words
        )
        depends = {"requests": self.requests.digest, "sizes": sizes, "knows": knows, "seed": config.seed}
        depends |= {"templates": templates, "words": words, "longest": config.extra_words}
        depends |= {"probe": self.gate.digest, "threshold": self.threshold, "refusal_ids": self.refusal_ids}
        found = context.cached(
            "wordings", depends, list[list[str]], lambda: search.run(self.requests, sizes, knows=knows), "wordings"
        )
        named = [self._named(f"{size}", best) for size, best in zip(sizes, found, strict=True)]
        attacker, scores = KNOWS if knows else BLIND, self.gate.scores
        return [partial(self._measured, attacker, float(n), p, scores) for n, p in zip(sizes, named, strict=True)]

    def _named(self, suffix: str, texts: Sequence[str]) -> PromptSet:
        made = (Prompt(id=f"{p.id}?{suffix}", text=text) for p, text in zip(self.requests, texts, strict=True))
        return PromptSet(name="wordings", prompts=tuple(made))

    def _pushes(self) -> Iterator[Callable[[], AuditRow]]:
        """What measures the plain requests with their residual pushed where the probe reads it: against its weights, or
        anywhere."""
        import torch

        from demur.method.perturbation import PushResidual

        reading, context = self.gate.probe.reading, self.context
        if reading.layer is None:
            context.warn("the probe reads features, not a residual, so nothing was pushed")
            return
        weights = torch.from_numpy(np.asarray(self.gate.probe.weights, dtype=np.float32))
        random = torch.randn(len(weights), generator=torch.Generator().manual_seed(context.config.seed))
        plain = self._named("push", [p.text for p in self.requests])
        for name, vector in ((TOWARDS, -weights), (ANYWHERE, random)):
            for radius in (0.0, *context.config.radii):
                push: Change = (PushResidual(vector, reading.layer, radius),) if radius else ()
                yield partial(self._measured, name, radius, plain, self.gate.fresh, push)

    def _measured(self, attacker: str, size: float, prompts: PromptSet, score: Scores, push: Change = ()) -> AuditRow:
        """What becomes of prompts under a push, without hardening and with it where the probe fires."""
        from demur.method.interventions import conditional

        with self.context.model.intervene([each.bind() for each in push]):
            fires = score(prompts) >= self.threshold
        harden = (conditional(self.change, prompts, map(bool, fires)),) if fires.any() else ()
        what = f"{attacker}, {size:g}"
        refused, clean = self._succeeds(what, prompts, push)
        _, hardened = self._succeeds(f"{what}, hardened", prompts, (*push, *harden))
        return AuditRow(
            attacker=attacker,
            size=size,
            flagged=_share(fires),
            refused=_share(refused),
            clean=_share(clean),
            hardened=_share(hardened),
        )

    def _succeeds(self, label: str, prompts: PromptSet, change: Change) -> tuple[np.ndarray, np.ndarray]:
        """Which prompts are refused, and on which the attack succeeds (nan: unscored)."""
        from demur.studies.jailbreaks import outcomes_of

        answers = self.context.answer(label, prompts, change)
        told = outcomes_of(self.context, answers, prompts, self.refusal_ids, change)
        refused = np.array(answers.refused, dtype=np.float64)
        return refused, np.where(np.isnan(refused), np.nan, [each == "succeeded" for each in told])


def _share(values: np.ndarray) -> Estimate:
    from demur.studies.harden.bench import share

    return share(np.asarray(values, dtype=np.float64)[None])


# -- sections ------------------------------------------------------------------------------------------------------


def sections(result: AuditResult) -> tuple[Section, ...]:
    """The sections of the study `audit`."""
    alarms = ", ".join(f"{name} {fmt.rate_text(rate)}" for name, rate in result.false_alarms.items())
    about = f"{result.change}, where {result.probe}, says P(harmful) ≥ {fmt.measure(result.threshold, 4)}. It fires on "
    found = [
        Section("Verdict", (Text(_headline(result), "verdict"),), brief=True),
        Section(
            "Wordings",
            (
                _table("Random search over wordings", "wordings tried", result.wordings),
                Chart(
                    "What wordings get through",
                    lambda: _chart(result.wordings, "wordings tried for each request"),
                    _KEY,
                ),
                Text(
                    "An attacker who does not know the probe only looks for wordings that are not refused. What would "
                    "refute that the probe is a weak point of its own: both getting through alike.",
                    "note",
                ),
            ),
            brief=True,
            intro=f"{about}{alarms}.",
        ),
        Section(
            "Pushes",
            (
                _table("The residual pushed where the probe reads it", "length, share of the norm", result.pushes),
                Chart("What pushes get through", lambda: _chart(result.pushes, "length, share of the norm"), _KEY),
            )
            if result.pushes
            else (),
            brief=True,
            intro="Nobody who only writes prompts can do this; it bounds what any wording could reach at the probe. "
            "The control is a push as long in a random direction.",
        ),
    ]
    return tuple(section for section in found if section.blocks)


def _headline(result: AuditResult) -> str:
    own, blind = ([row for row in result.wordings if row.attacker == name] for name in (KNOWS, BLIND))
    start, end, other = own[0], own[-1], blind[-1]
    said = [
        f"With {end.size:g} wordings for each of {result.n} refused requests, an attacker who knows the probe gets "
        f"{fmt.rate_text(end.hardened)} past the hardened model (without hardening {fmt.rate_text(end.clean)}); one "
        f"who does not know it, {fmt.rate_text(other.hardened)} ({fmt.rate_text(other.clean)}).",
        f"The probe fires on {fmt.rate_text(start.flagged)} of the plain requests, on {fmt.rate_text(end.flagged)} of "
        f"the wordings found against it, and on {fmt.rate_text(other.flagged)} of the others.",
    ]
    pushed = [row for row in result.pushes if row.attacker == TOWARDS and row.size]
    if (half := next((row for row in pushed if row.flagged.value < 0.5), None)) is not None:
        control = next(r for r in result.pushes if r.attacker == ANYWHERE and r.size == half.size)
        said.append(
            f"A push of {fmt.short_number(half.size)} of the residual's norm against its weights leaves the probe "
            f"firing on {fmt.rate_text(half.flagged)}, one in a random direction on {fmt.rate_text(control.flagged)}."
        )
    return " ".join(said)


def _table(title: str, size: str, rows: Sequence[AuditRow]) -> Table:
    heads = f"attacker | > {size} | > probe fires | > refused without hardening | > succeeds without hardening | "
    cells = ((r.attacker, fmt.short_number(r.size), r.flagged, r.refused, r.clean, r.hardened) for r in rows)
    return Table.of(title, heads + "> succeeds on the hardened model", cells)


_SHORT = {KNOWS: "knows it", BLIND: "does not", TOWARDS: "against it", ANYWHERE: "random"}


def _chart(rows: Sequence[AuditRow], x_title: str) -> Any:
    series: list[charts.Series] = []
    for name in dict.fromkeys(row.attacker for row in rows):
        for measure, what in (("flagged", "fires"), ("hardened", "through")):
            points = tuple(charts.Point.of(r.size, getattr(r, measure)) for r in rows if r.attacker == name)
            series.append(charts.Series(f"{what}; {_SHORT[name]}", points))
    return charts.line_chart(series, x_title=x_title, y_title="requests")


STUDY = Study("audit", Config, AuditResult, run, sections)
