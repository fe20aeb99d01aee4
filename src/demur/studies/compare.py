"""The experiment: methods that suppress and induce refusal, side by side on the same prompts (paper, section 4.1).

F* → each method's set → strengths (tuning prompts) → answers (test prompts) → side effects → comparisons. `demur study`
is this experiment with F*, its controls and the direction; `demur benchmark` has every method and all side effects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

from demur.errors import InputError
from demur.judges import CachedJudge, get_judge
from demur.method.interventions import ScaleFeatures
from demur.method.selection import global_set
from demur.model import peak_memory
from demur.stats import Estimate, clustered_rate, holm, mcnemar, one_more_draw
from demur.studies import pipeline, results
from demur.studies.comparisons import Curve, Point, compare_at_level, compare_chosen
from demur.studies.config import COMPLIANCE, MAIN, CompareConfig, SideEffectOptions, TuneOptions
from demur.studies.context import Change, Context, JudgedAnswers
from demur.studies.methods import Method, Selection, Sets, get_method
from demur.studies.pipeline import Found, split_used
from demur.studies.results import CompareResult, EffectRow, Kind, MethodExtras, Prompts, SideEffects
from demur.studies.side_effects import SideEffectMeter, SideInputs, mean_side_effects
from demur.types import REFUSALS, Outcome, PromptSet, Value

_SAMPLES = 4
"""Answers of each condition that the report shows."""

RowT = TypeVar("RowT", bound=Value)


class _Clean(Method):
    name, label = "none", "clean model"


class Asked(NamedTuple):
    """Answers that are wanted: to one set of prompts, under one method at one strength."""

    split: Literal["tuning", "test"]
    kind: Kind
    method: Method
    strength: float
    prompts: Prompts


class Condition(NamedTuple):
    """One method at one strength on one set of prompts: its changes (several for a control), and the answers."""

    method: Method
    kind: Kind
    strength: float
    setting: str
    """The strength with its unit."""
    prompts: Prompts
    changes: tuple[Change, ...]
    runs: tuple[JudgedAnswers, ...]
    chosen: bool = False
    """The strength is the one that the tuning prompts chose."""


class Strengths(NamedTuple):
    """What the tuning prompts chose for a method; `scored` is False where no answer could be scored."""

    suppress: float
    induce: float | None
    scored: bool = True


def run_comparison(context: Context[Any], found: Found | None = None) -> CompareResult:
    """Compare the methods of the configuration, a `CompareConfig`, with F*: `found`, or else found as it says. Raises
    DemurError: inputs that do not fit, or a model that never refuses; nothing computed before is lost."""
    return Experiment(context).run(found)


class Experiment:
    """The experiment, step by step. Each step keeps what later ones need."""

    found: Found
    """F*; a search for settings may choose another one."""
    sets: dict[str, Sets]
    """Method → where its sets come from: F*'s own workspace, or the settings that a search chose for the method."""

    def __init__(self, context: Context[Any]) -> None:
        """Everything named is read before anything is computed: a mistake in it must not cost hours."""
        self.context = context
        self.config: CompareConfig = context.config
        self.everything = isinstance(self.config, SideEffectOptions)
        self.side = self.config if isinstance(self.config, SideEffectOptions) else SideEffectOptions(knowledge=False)
        inputs = SideInputs.read(self.side, context) if self.everything else SideInputs((), None)
        self.texts, splits = inputs.texts, context.splits
        test: dict[Prompts, PromptSet] = {"harmful": splits.test.harmful, "harmless": splits.test.harmless}
        if inputs.over_refusal is not None:
            test["over-refusal"] = inputs.over_refusal
        tuning: dict[Prompts, PromptSet] = {"harmful": splits.tuning.harmful, "harmless": splits.tuning.harmless}
        self.prompts = {"tuning": tuning, "test": test}
        self.methods = tuple(map(get_method, self.config.methods))
        self.harm = self._judges_of_harm()
        for judging in self._judging:
            judging.reader.check()
        self._clean: dict[Prompts, JudgedAnswers] = {}
        self.strengths: dict[str, Strengths] = {}
        self.conditions: list[Condition] = []
        self.trials: tuple[results.Trial, ...] = ()

    def _judges_of_harm(self) -> dict[str, CachedJudge]:
        """Judges of harm by name; every verdict of theirs is kept."""
        judges = [get_judge(name) for name in self.config.harm_judges]
        names = [judge.name for judge in judges]
        if len(set(names)) < len(names):
            raise InputError(f"two of the judges have one name ({', '.join(names)}); give each once")
        return {judge.name: CachedJudge(self.context.run, judge, self.context.progress, keep=True) for judge in judges}

    def run(self, found: Found | None) -> CompareResult:
        context = self.context
        self.found = found or pipeline.find(context, context.splits.choosing)
        context.watch_coherence([answer for each in self.found.clean.answers["tuning"] for answer in each.answers])
        with context.timed("clean answers"):
            self.context.each(partial(self.clean, name) for name in self.prompts["test"])
            pipeline.warn_of_over_refusal(context, "test prompts", self.clean("harmless"))
        with context.timed("features of the methods"):
            self._prepare()
        with context.timed("exact patching"):
            refused = split_used(self.clean("harmful"), self.clean("harmless")).harmful.head(self.config.n_exact)
            estimators, exact = pipeline.compare_estimators(context, self.found, refused)
        with context.timed("tuning"):
            self._tune()
        meter = SideEffectMeter(context, self.side, self.clean("harmless"), self.texts)
        with context.timed("suppression and induction"):
            answers = (partial(self._answer, each) for each in (*self._suppressing(), *self._inducing()))
            # What all side effects are compared with: a process for which no answers are left begins with it.
            made: list[Any] = self.context.each((*answers, partial(meter.measure, ())))
            self.conditions += made[:-1]
        with context.timed("side effects"):
            measured = self._measure(meter)
            extras = self._extras(meter)
            sizes = self._sizes(meter)
        with context.timed("comparisons"):
            effects = self._effects(measured)
            comparisons = self._comparisons(measured)
        self._warn(extras)
        found = self.found
        return CompareResult(
            k=len(found.chosen),
            pool_size=len(found.pool.features),
            labels={method.name: method.label for method in self.methods},
            controls_drawn=tuple(method.name for method in self.methods if method.control),
            harm_judges=tuple(self.harm),
            splits=self._splits(),
            refusal_tokens=found.clean.tokens,
            direction=pipeline.direction_info(context, found),
            without_signal=found.attribution.share_without_signal,
            features=pipeline.feature_rows(context, found, exact),
            estimators=estimators,
            local_overlap=found.local_overlap,
            sets={m.name: self.sets[m.name][m.name][0] for m in self.methods if m.has_set and not m.control},
            effects=effects,
            controls=self._controls(),
            comparisons=comparisons,
            sizes=sizes,
            trials=self.trials,
            extras=extras,
            samples=self._samples(),
            counters=self._counters(),
            usage=self._close_judges(),
            peak_memory=peak_memory(context.model.device),
        )

    # -- strengths, from the tuning prompts ----------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Each method's sets: at the configured settings, or at those that a search chose for that very method."""
        context, config = self.context, self.config
        shared = Sets(Selection(context, self.found, len(self.found.chosen)), config)
        self.sets = {method.name: shared for method in self.methods}
        if isinstance(config, TuneOptions) and config.tune:
            from demur.studies.tuning import search

            chosen = search(context, context.splits.choosing, config, self.methods)
            self.trials = chosen.trials
            self.strengths = {name: Strengths(strength, None) for name, strength in chosen.strengths.items()}
            # Controls are matched to the F* that the search chose, local sets follow their global one.
            self.sets |= chosen.sets | {m.name: chosen.sets[m.leader] for m in self.methods if m.leader}
            self.found = self.sets[MAIN].given.found
        # A control for which no set could be drawn is left out; the method has warned.
        self.methods = tuple(m for m in self.methods if not m.has_set or self.sets[m.name][m.name])
        for sets in self.sets.values():
            for warning in sets.given.work.warnings:  # Of the settings that the search chose.
                context.warn(warning)

    def _tune(self) -> None:
        """Choose each method's strengths on the tuning prompts, by one rule for all."""
        clean = self.found.clean.answers["tuning"][1]
        meter = SideEffectMeter(self.context, self.side, clean)
        leading = [method for method in self.methods if not method.leader]
        free = [method for method in leading if method.name not in self.strengths]
        suppressing = (partial(self._best_factor, method, clean, meter) for method in free)
        inducing = (partial(self._best_value, method) for method in leading)
        best = iter(self.context.each((*suppressing, *inducing)))
        factors = {method.name: next(best) for method in free}
        values = {method.name: next(best) for method in leading}
        for method in sorted(self.methods, key=lambda method: bool(method.leader)):
            if method.leader:
                self.strengths[method.name] = self.strengths[method.leader]
                continue
            known = self.strengths.get(method.name)
            factor = known.suppress if known else factors[method.name]
            if factor is None:
                self.context.warn(
                    f"none of the tuning answers under {method.label} could be scored, so it has no best strength; "
                    "the first one is shown, and not compared"
                )
            first = method.strengths(self.config, "suppress")[0]
            chosen = first if factor is None else factor
            self.strengths[method.name] = Strengths(chosen, values[method.name], factor is not None)

    def _best_factor(self, method: Method, clean: JudgedAnswers, meter: SideEffectMeter) -> float | None:
        """The strength with the highest sum of harmful prompts complied with and answered harmless prompts kept as they
        were (shares); of equals the one with the lower ΔCE, then the milder one. None where nothing is scored."""
        ranks: dict[float, tuple[float, float, float]] = {}
        factors = method.strengths(self.config, "suppress")
        sets: tuple[Prompts, Prompts] = ("harmful", "harmless")
        asked = (Asked("tuning", "suppress", method, factor, name) for factor in factors for name in sets)
        found = iter(self.context.each(partial(self._answer, each) for each in asked))
        for factor in factors:
            harmful, harmless = next(found), next(found)
            kept = share_of(harmless.runs, clean, lambda run: run.matches(clean), Outcome.COMPLIANCE)
            score = harmful.runs[0].compliance.value + (kept.value if kept.n else 0.0)
            rise = meter.ce_answers(harmful.changes[0]).value
            # Differences in the last digits are no reason to prefer a strength.
            ranks[factor] = (round(score, 9), -round(rise, 6), -abs(factor - 1.0))
        known = [factor for factor, rank in ranks.items() if not math.isnan(rank[0])]
        return max(known, key=lambda factor: ranks[factor]) if known else None

    def _best_value(self, method: Method) -> float | None:
        """The strength under which most harmless tuning prompts are refused; the mildest of equals, or the
        first where nothing is scored. None where the method cannot induce."""
        values = method.strengths(self.config, "induce")
        if not all(method.induce(self.sets[method.name], value) for value in values):
            return None
        asked = (Asked("tuning", "induce", method, value, "harmless") for value in values)
        answered = self.context.each(partial(self._answer, each) for each in asked)
        rates = {value: each.runs[0].refusal.value for value, each in zip(values, answered, strict=True)}
        known = [value for value in rates if not math.isnan(rates[value])]
        return max(known or values[:1], key=lambda value: (rates[value], -value))

    # -- answers on the test prompts -----------------------------------------------------------------------------------

    def clean(self, prompts: Prompts) -> JudgedAnswers:
        """The clean model's answers to a set of test prompts."""
        if prompts not in self._clean:
            self._clean[prompts] = self.context.answer(f"clean: test, {prompts}", self.prompts["test"][prompts])
        return self._clean[prompts]

    def _answer(self, wanted: Asked) -> Condition:
        """Answers under a method at a strength, one set of them for each change."""
        split, kind, method, strength, prompts = wanted
        sets, asked, best = self.sets[method.name], self.prompts[split][prompts], self.strengths.get(method.name)
        suppressing = kind == "suppress"
        changes = method.suppress(sets, strength, asked) if suppressing else method.induce(sets, strength)
        setting = method.strength_text(self.config, kind, strength)
        title = ", ".join(part for part in (f"{split}: {method.name}", setting, prompts) if part)
        titles = [title] if len(changes) == 1 else [f"{title} ({n})" for n in range(1, len(changes) + 1)]
        pairs = zip(titles, changes, strict=True)
        answers = [partial(self.context.answer, told, asked, change) for told, change in pairs]
        runs = tuple(self.context.each(answers))
        chosen = best is not None and strength == (best.suppress if suppressing else best.induce)
        return Condition(method, kind, strength, setting, prompts, changes, runs, chosen)

    def _suppressing(self) -> list[Asked]:
        """Every method at every strength on harmful test prompts, and at its chosen one on harmless and over-refusal
        prompts."""
        asked: list[Asked] = []
        for method in self.methods:
            best = self.strengths[method.name].suppress
            only = method.follows or (method.control and self.config.controls == "chosen")
            strengths = (best,) if only else dict.fromkeys((*method.strengths(self.config, "suppress"), best))
            asked += [Asked("test", "suppress", method, factor, "harmful") for factor in strengths]
            others: list[Prompts] = [name for name in self.prompts["test"] if name != "harmful" and not method.local]
            asked += [Asked("test", "suppress", method, best, name) for name in others]
        return asked

    def _inducing(self) -> list[Asked]:
        """Every method that can induce, at every strength on harmless test prompts."""
        asked: list[Asked] = []
        for method in self.methods:
            best = self.strengths[method.name].induce
            if best is not None and not method.local:
                only = method.control and self.config.controls == "chosen"
                values = (best,) if only else method.strengths(self.config, "induce")
                asked += [Asked("test", "induce", method, value, "harmless") for value in values]
        return asked

    @property
    def _shown(self) -> list[Condition]:
        """The clean model, and every method at its chosen strengths."""
        return [*self._untouched, *(each for each in self.conditions if each.chosen)]

    @property
    def _untouched(self) -> list[Condition]:
        return [Condition(_Clean(), "none", 1.0, "", each, ((),), (self.clean(each),)) for each in self.prompts["test"]]

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _splits(self) -> tuple[results.SplitUse, ...]:
        answers = self.found.clean.answers | {"test": (self.clean("harmful"), self.clean("harmless"))}
        return tuple(row for name, pair in answers.items() for row in pipeline.split_use(name, *pair))

    def _measure(self, meter: SideEffectMeter) -> dict[tuple[str, float], SideEffects]:
        """Side effects of each method's suppression at each strength; local sets have none of their own."""
        conditions = [each for each in self.conditions if each.prompts == "harmful" and not each.method.local]
        changes = [change for each in conditions for change in each.changes]
        effects = iter(self.context.each((partial(meter.measure, change) for change in changes), "side effects"))
        return {(c.method.name, c.strength): mean_side_effects([next(effects) for _ in c.changes]) for c in conditions}

    def _effects(self, measured: dict[tuple[str, float], SideEffects]) -> tuple[EffectRow, ...]:
        rows = [self._row(each, measured) for each in (*self._untouched, *self.conditions)]
        kinds = ([row for row in rows if row.kind == kind] for kind in ("none", "suppress", "induce"))
        return tuple(row for group in kinds for row in _adjusted(group, "p_clean", "p_clean"))

    def _row(self, each: Condition, measured: dict[tuple[str, float], SideEffects]) -> EffectRow:
        runs, clean = each.runs, self.clean(each.prompts)
        touched, harmful = each.kind != "none", each.prompts == "harmful"
        changes: dict[str, Estimate] = {}
        if touched:
            changes["kept"] = share_of(runs, clean, lambda run: run.complied, Outcome.COMPLIANCE)
            changes["exact_match"] = share_of(runs, clean, lambda run: run.matches(clean), Outcome.COMPLIANCE)
        if touched and not harmful:
            changes["repaired"] = share_of(runs, clean, lambda run: run.complied, *REFUSALS)
        return EffectRow(
            prompts=each.prompts,
            kind=each.kind,
            method=each.method.name,
            strength=each.strength,
            setting=each.setting,
            sets=len(runs),
            refusal=clustered_rate([run.refused for run in runs]),
            compliance=clustered_rate([run.complied for run in runs]),
            incoherent=clustered_rate([run.incoherent for run in runs]),
            outcomes={outcome: sum(run.has(outcome).count(True) for run in runs) for outcome in Outcome},
            attack={name: clustered_rate(self._successes(runs, name)) for name in self.harm} if harmful else {},
            **changes,
            side_effects=measured.get((each.method.name, each.strength)) if harmful else None,
            p_clean=mcnemar(runs[0].refused, clean.refused).p if touched and len(runs) == 1 else None,
            chosen=each.chosen,
        )

    def _successes(self, runs: Sequence[JudgedAnswers], measure: str) -> list[tuple[bool | None, ...]]:
        """Per run and prompt: the request got what it asks for, by one measure; None where unscored."""
        if measure == COMPLIANCE:
            return [run.complied for run in runs]
        return [tuple(v.success for v in self.harm[measure].judge(run.answers).verdicts) for run in runs]

    def _controls(self) -> tuple[results.ControlRow, ...]:
        """F* against each control at the chosen strengths."""
        rows: list[results.ControlRow] = []
        main = {(c.kind, c.prompts): c.runs for c in self.conditions if c.method.name == MAIN and c.chosen}
        # Controls count where F* is to do something: on harmful prompts it suppresses, on harmless ones it induces.
        meant: dict[Kind, tuple[Prompts, Literal["compliance", "refusal"]]]
        meant = {"suppress": ("harmful", "compliance"), "induce": ("harmless", "refusal")}
        for each in self.conditions:
            prompts, measure = meant[each.kind]
            if not (each.method.control and each.chosen and each.prompts == prompts):
                continue
            value, *sets = (getattr(run, measure).value for run in (*main[each.kind, prompts], *each.runs))
            if any(map(math.isnan, (value, *sets))):
                continue
            test = one_more_draw(value, sets, n=len(each.runs[0].answers))
            found: dict[str, Any] = {"value": value, "sets": sets, "low": test.low, "high": test.high, "p": test.p}
            name = each.method.name
            rows.append(results.ControlRow(control=name, prompts=prompts, kind=each.kind, measure=measure, **found))
        return tuple(rows)

    def _comparisons(self, measured: dict[tuple[str, float], SideEffects]) -> tuple[results.Comparison, ...]:
        """F* against every other method, by compliance and by each judge of harm: at chosen strengths, and at equal
        ΔCE."""
        rows: list[results.Comparison] = []
        levels = self.config.ce_levels if self.everything else ()
        for measure in (COMPLIANCE, *self.harm):
            curves = {method.name: self._curve(method, measured, measure) for method in self.methods}
            main = curves.pop(MAIN)
            groups = [[compare_chosen(main, other, measure) for other in curves.values()]]
            curved = [other for other in curves.values() if not other.local]
            for level in levels:
                groups.append([compare_at_level(main, o, measure, level, self.side.resamples) for o in curved])
            rows += [row for group in groups for row in _adjusted(group, "p", "p_holm")]
        return tuple(rows)

    def _curve(self, method: Method, measured: dict[tuple[str, float], SideEffects], measure: str) -> Curve:
        points: list[Point] = []
        chosen: Point | None = None
        for each in self.conditions:
            if each.method is method and each.prompts == "harmful":
                effects = measured.get((method.name, each.strength))
                ce = None if effects is None else effects.ce_answers.value
                points.append(Point(each.setting, self._successes(each.runs, measure), ce))
                if each.chosen and self.strengths[method.name].scored:
                    chosen = points[-1]
        clean = self._successes([self.clean("harmful")], measure)
        return Curve(method.name, tuple(points), chosen, clean, method.local)

    def _sizes(self, meter: SideEffectMeter) -> tuple[results.SizeRow, ...]:
        """F* cut or grown to each size, at its chosen strength."""
        harmful, found = self.context.splits.test.harmful, self.found
        factor, main = self.strengths[MAIN].suppress, self.methods[0]
        sizes = [size for size in self.config.sizes if size <= len(found.pool.features)]
        if left := [size for size in self.config.sizes if size not in sizes]:
            self.context.warn(
                f"sizes of F* from {min(left)} on were left out: the pool holds {len(found.pool.features)} features; "
                "raise --k0, or fill the pool by attribution"
            )

        def row(size: int) -> results.SizeRow:
            change: Change = (ScaleFeatures(global_set(found.attribution, size).features, factor),)
            answers = self.context.answer(f"test: F* of {size}", harmful, change)
            return results.SizeRow(
                size=size,
                setting=main.strength_text(self.config, "suppress", factor),
                refusal=answers.refusal,
                compliance=answers.compliance,
                incoherent=clustered_rate([answers.incoherent]),
                ce_answers=meter.ce_answers(change),
            )

        return tuple(self.context.each(partial(row, size) for size in sizes))

    def _extras(self, meter: SideEffectMeter) -> tuple[results.MethodExtras, ...]:
        """What the model still knows and can do: clean, and under each method at its chosen strength."""
        if not (self.side.knowledge or self.side.tasks):
            return ()
        test = self.context.splits.test

        def row(each: Condition) -> results.MethodExtras:
            # Of several random sets the first one speaks for all.
            change = each.changes[0]
            return results.MethodExtras(
                method=each.method.name,
                setting=each.setting,
                knowledge=meter.knowledge(test.harmful, test.harmless, change) if self.side.knowledge else None,
                capability=meter.capability(change) if len(each.changes) == 1 else (),
            )

        shown = [each for each in self._shown if each.prompts == "harmful" and not each.method.local]
        return tuple(self.context.each(partial(row, each) for each in shown))

    def _samples(self) -> tuple[results.Sample, ...]:
        """The first answers to test prompts: of the clean model, and under each method at its chosen strength."""
        return tuple(
            results.Sample(
                prompt_id=answer.prompt.id,
                prompt=answer.prompt.text,
                label="harmless" if answer.prompt.label == "harmless" else "harmful",
                method=each.method.name,
                kind=each.kind,
                setting=each.setting,
                text=answer.text,
                outcome=verdict.outcome,
            )
            for each in self._shown
            if each.prompts == "harmful" or (each.prompts == "harmless" and each.method.name in ("none", MAIN))
            for answer, verdict in islice(zip(each.runs[0].answers, each.runs[0].verdicts, strict=True), _SAMPLES)
        )

    def _counters(self) -> dict[str, tuple[int, int]]:
        counted = {name: (count.made, count.found) for name, count in self.context.run.counters.items()}
        return counted | {"verdicts": (sum(j.new for j in self._judging), sum(j.cached for j in self._judging))}

    def _close_judges(self) -> dict[str, str]:
        """Free the judges of harm; what was asked of endpoints."""
        for judging in self.harm.values():
            judging.reader.close()
        readers = [judging.reader for judging in self._judging]
        return {reader.name: str(reader.usage) for reader in readers if reader.usage}

    @property
    def _judging(self) -> tuple[CachedJudge, ...]:
        return (self.context.judging, *self.harm.values())

    def _warn(self, extras: tuple[MethodExtras, ...]) -> None:
        context = self.context
        for judging in self.harm.values():
            if judging.warning:
                context.warn(judging.warning)
        known = extras[0].knowledge if extras else None
        if self.side.knowledge and known is None:
            context.warn("yes and no begin with the same token, so the model was not asked what it knows")
        elif known is not None and known.auroc.low <= 0.5:
            context.warn(
                "asked whether requests are harmful, the clean model does no better than chance (AUROC "
                f"{known.auroc.value:.2f}), so that question says nothing about the methods"
            )


def share_of(
    runs: Sequence[JudgedAnswers],
    clean: JudgedAnswers,
    values: Callable[[JudgedAnswers], Sequence[bool | None]],
    *outcomes: Outcome,
) -> Estimate:
    """A share over the prompts whose clean answer has one of `outcomes`, over all runs.

    Args:
        runs: answers, once for each set drawn.
        clean: of the clean model to the same prompts.
        values: per prompt of a run; None when unscored.
        outcomes: of the clean answers that count.
    """
    places = [n for n, verdict in enumerate(clean.verdicts) if verdict.outcome in outcomes]
    return clustered_rate([[values(run)[n] for n in places] for run in runs])


def _adjusted(rows: Sequence[RowT], raw: str, adjusted: str) -> list[RowT]:
    """Rows with their p values adjusted over all of them (Holm); None where there was no test."""
    found = holm([math.nan if (p := getattr(row, raw)) is None else p for row in rows])
    return [
        row if getattr(row, raw) is None else row.model_copy(update={adjusted: p})
        for row, p in zip(rows, found, strict=True)
    ]
