"""The experiment: methods that suppress and induce refusal, side by side on the same prompts (paper, section 4.1).

F* → each method's set → strengths (tuning prompts) → answers (test prompts) → side effects → comparisons. `demur study`
is this experiment with F*, its controls and the direction; `demur benchmark` has every method and all side effects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from demur.errors import InputError
from demur.judges import CachedJudge, Judge, get_judge
from demur.method.attribution import Attribution
from demur.method.interventions import ScaleFeatures
from demur.method.selection import global_set
from demur.model import peak_memory
from demur.stats import Estimate, clustered_rate, holm, mcnemar, one_more_draw
from demur.studies.answers import Change, JudgedAnswers
from demur.studies.comparisons import Curve, compare_at_level, compare_chosen
from demur.studies.config import COMPLIANCE, MAIN, CompareConfig, SideEffectOptions, TuneOptions
from demur.studies.context import Context
from demur.studies.methods import Method, Selection, Sets, get_method
from demur.studies.pipeline import (
    Found,
    compare_estimators,
    find,
    measure_activity,
    split_use,
    split_used,
    warn_of_over_refusal,
)
from demur.studies.results import (
    CompareResult,
    Comparison,
    ControlRow,
    DirectionInfo,
    EffectRow,
    FeatureRow,
    Kind,
    MethodExtras,
    Prompts,
    Sample,
    SideEffects,
    SizeRow,
    SplitUse,
    Trial,
)
from demur.studies.side_effects import SideEffectMeter, SideInputs, mean_side_effects
from demur.types import REFUSALS, Outcome, PromptSet, Split

_SAMPLES = 4
"""Answers of each condition that the report shows."""


@dataclass(frozen=True)
class Condition:
    """One method at one strength on one set of prompts: its changes (several for a control), and the answers."""

    method: Method
    kind: Kind
    strength: float
    prompts: Prompts
    changes: tuple[Change, ...]
    runs: tuple[JudgedAnswers, ...]


@dataclass(frozen=True)
class Strengths:
    """What the tuning prompts chose for a method; `scored` is False where no answer could be scored."""

    suppress: float
    induce: float | None
    scored: bool = True


def run_comparison(context: Context[Any], found: Found | None = None) -> CompareResult:
    """Compare the configured methods.

    Args:
        context: its configuration is a `CompareConfig`.
        found: F* where it is at hand (default: found as the configuration says).

    Raises:
        DemurError: inputs that do not fit, or a model that never refuses; nothing computed before is lost.
    """
    return Experiment(context, context.config, found).run()


@dataclass
class Experiment:
    """The experiment, step by step. Each step keeps what later ones need."""

    context: Context[Any]
    config: CompareConfig
    given: Found | None = None
    strengths: dict[str, Strengths] = field(default_factory=dict[str, Strengths])
    conditions: list[Condition] = field(default_factory=list[Condition])
    sets: dict[str, Sets] = field(default_factory=dict[str, Sets])
    """Method → where its sets come from: F*'s own workspace, or the settings that a search chose for the method."""
    trials: tuple[Trial, ...] = ()
    over_refusal: PromptSet | None = None
    _clean: dict[Prompts, JudgedAnswers] = field(default_factory=dict[Prompts, JudgedAnswers])

    def run(self) -> CompareResult:
        context = self.context
        # Everything named is read before anything is computed: a mistake in it must not cost hours.
        everything = isinstance(self.config, SideEffectOptions)
        side_inputs = SideInputs.read(self.side, context) if everything else SideInputs((), None)
        self.over_refusal = side_inputs.over_refusal
        self._check_judges()
        tuning = self.found.clean.answers["tuning"]
        context.watch_coherence([answer for each in tuning for answer in each.answers])
        with context.timed("clean answers"):
            warn_of_over_refusal(context, "test prompts", self.clean("harmless"))
        with context.timed("features of the methods"):
            self._prepare()
        found = self.found  # The search for settings may have chosen another F*.
        with context.timed("exact patching"):
            refused = split_used(self.clean("harmful"), self.clean("harmless")).harmful.head(self.config.n_exact)
            estimators, exact = compare_estimators(context, found, refused)
        with context.timed("tuning"):
            self._tune()
        with context.timed("suppression"):
            self._suppress()
        with context.timed("induction"):
            self._induce()
        meter = SideEffectMeter(context, self.side, self.clean("harmless"), side_inputs.texts)
        with context.timed("side effects"):
            measured = self._measure(meter)
            extras = self._extras(meter)
            sizes = self._sizes(meter)
        with context.timed("comparisons"):
            effects = self._effects(measured)
            comparisons = self._comparisons(measured)
        self._warn(extras)
        return CompareResult(
            k=len(found.chosen),
            pool_size=len(found.pool.features),
            labels={method.name: method.label for method in self.methods},
            controls_drawn=tuple(method.name for method in self.methods if method.control),
            harm_judges=self._harm_names,
            splits=self._splits(),
            refusal_tokens=found.clean.tokens,
            direction=_direction_info(context, found),
            without_signal=found.attribution.share_without_signal,
            features=self._features(found, exact),
            estimators=estimators,
            local_overlap=_overlap(found),
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

    # -- what is compared, and on what ---------------------------------------------------------------------------------

    @cached_property
    def side(self) -> SideEffectOptions:
        """Side effects to measure: those of the configuration, or ΔCE and KL alone."""
        return self.config if isinstance(self.config, SideEffectOptions) else SideEffectOptions(knowledge=False)

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        return tuple(get_method(name) for name in self.config.methods)

    @cached_property
    def harm(self) -> tuple[CachedJudge, ...]:
        """Judges of harm; every verdict of theirs is kept."""
        judges: list[Judge] = [get_judge(name) for name in self.config.harm_judges]
        names = [judge.name for judge in judges]
        if len(set(names)) < len(names):
            raise InputError(f"two of the judges have one name ({', '.join(names)}); give each once")
        return tuple(CachedJudge(self.context.run, judge, self.context.progress, keep=True) for judge in judges)

    @property
    def _harm_names(self) -> tuple[str, ...]:
        return tuple(judging.reader.name for judging in self.harm)

    @property
    def _all_judging(self) -> tuple[CachedJudge, ...]:
        return (self.context.judging, *self.harm)

    def _check_judges(self) -> None:
        """Look up every method and try every judge now, rather than find out in the middle of a run."""
        _ = self.methods
        for judging in self._all_judging:
            judging.reader.check()

    def _close_judges(self) -> dict[str, str]:
        """Free the judges of harm; what was asked of endpoints."""
        for judging in self.harm:
            judging.close()
        return {judging.reader.name: str(judging.usage) for judging in self._all_judging if judging.usage}

    @cached_property
    def found(self) -> Found:
        """F*, found on prompts that are not test prompts."""
        return self.given or find(self.context, self.context.splits.choosing)

    def clean(self, prompts: Prompts) -> JudgedAnswers:
        """The clean model's answers to a set of test prompts."""
        if prompts not in self._clean:
            self._clean[prompts] = self.context.answer(f"clean: test, {prompts}", self._prompts(prompts))
        return self._clean[prompts]

    def _prompts(self, name: Prompts) -> PromptSet:
        if name == "over-refusal":
            assert self.over_refusal is not None
            return self.over_refusal
        test = self.context.splits.test
        return test.harmful if name == "harmful" else test.harmless

    def _splits(self) -> tuple[SplitUse, ...]:
        rows = [row for name, pair in self.found.clean.answers.items() for row in split_use(name, *pair)]
        return (*rows, *split_use("test", self.clean("harmful"), self.clean("harmless")))

    def _features(self, found: Found, exact: Attribution | None) -> tuple[FeatureRow, ...]:
        activity = measure_activity(self.context, found.clean, found.chosen.features)
        return tuple(
            FeatureRow(
                feature=feature,
                score=found.chosen.scores[n],
                cosine=found.pool.cosine(feature),
                exact=None if exact is None else float(exact.means.mean(0)[exact.features.index(feature)]),
                rate_harmful=activity.rate_harmful[n],
                rate_harmless=activity.rate_harmless[n],
                max_harmful=activity.max_harmful[n],
            )
            for n, feature in enumerate(found.chosen.features)
        )

    def _prepare(self) -> None:
        """Each method's sets: at the configured settings, or at those that a search chose for that very method."""
        shared = Sets(Selection(self.context, self.found, len(self.found.chosen)), self.config)
        self.sets = {method.name: shared for method in self.methods}
        if isinstance(self.config, TuneOptions) and self.config.tune:
            from demur.studies.tuning import search

            chosen = search(self.context, self.context.splits.choosing, self.config, self.methods)
            self.trials = chosen.trials
            self.sets |= chosen.sets
            self.strengths |= {n: Strengths(s, None) for n, s in chosen.strengths.items()}
            # Controls are matched to the F* that the search chose, local sets follow their global one.
            for method in self.methods:
                if method.control or method.follows:
                    self.sets[method.name] = self.sets[method.follows or MAIN]
            self.given = self.sets[MAIN].given.found
            self.__dict__.pop("found", None)
        # A control for which no set could be drawn is left out; the method has warned.
        self.methods = tuple(m for m in self.methods if not m.has_set or self.sets[m.name][m.name])
        for sets in self.sets.values():
            for warning in sets.given.work.warnings:  # Of the settings that the search chose.
                self.context.warn(warning)

    # -- strengths, from the tuning prompts ----------------------------------------------------------------------------

    def _tune(self) -> None:
        """Choose each method's strengths on the tuning prompts, by one rule for all."""
        context = self.context
        split = context.splits.choosing.tuning
        harmless = self.found.clean.answers["tuning"][1]
        meter = SideEffectMeter(context, self.side, harmless)
        for method in self.methods:
            if method.control or method.follows:
                continue
            known = self.strengths.get(method.name)
            factor = known.suppress if known else self._best_factor(method, split, harmless, meter)
            if factor is None:
                context.warn(
                    f"none of the tuning answers under {method.label} could be scored, so it has no best strength; "
                    "the first one is shown, and not compared"
                )
            self.strengths[method.name] = Strengths(
                method.strengths(self.config, "suppress")[0] if factor is None else factor,
                self._best_value(method, split.harmless),
                scored=factor is not None,
            )
        for method in self.methods:
            if method.control or method.follows:
                self.strengths[method.name] = self.strengths[method.follows or MAIN]

    def _best_factor(self, method: Method, split: Split, clean: JudgedAnswers, meter: SideEffectMeter) -> float | None:
        """The strength with the highest sum of harmful prompts complied with and answered harmless prompts kept as they
        were (shares); of equals the one with the lower ΔCE, then the milder one. None where nothing is scored."""
        ranks: dict[float, tuple[float, float, float]] = {}
        for factor in method.strengths(self.config, "suppress"):
            title = f"tuning: {method.name}, {method.strength_text(self.config, 'suppress', factor)}"
            harmful = self._answer("suppress", method, factor, split.harmful, title)
            harmless = self._answer("suppress", method, factor, split.harmless, f"{title}, harmless")
            kept = share_of(harmless.runs, clean, lambda run: run.matches(clean), Outcome.COMPLIANCE)
            score = harmful.runs[0].compliance.value + (kept.value if kept.n else 0.0)
            rise = meter.ce_answers(harmful.changes[0]).value
            # Differences in the last digits are no reason to prefer a strength.
            ranks[factor] = (round(score, 9), -round(rise, 6), -abs(factor - 1.0))
        known = [factor for factor, rank in ranks.items() if not math.isnan(rank[0])]
        return max(known, key=lambda factor: ranks[factor]) if known else None

    def _best_value(self, method: Method, harmless: PromptSet) -> float | None:
        """The strength under which most harmless tuning prompts are refused; the mildest of equals. None where the
        method cannot induce."""
        rates: dict[float, float] = {}
        for value in method.strengths(self.config, "induce"):
            if not method.induce(self.sets[method.name], value):
                return None
            title = f"tuning: {method.name}, {method.strength_text(self.config, 'induce', value)}"
            rates[value] = self._answer("induce", method, value, harmless, title).runs[0].refusal.value
        known = [value for value in rates if not math.isnan(rates[value])]
        return max(known or list(rates), key=lambda value: (rates[value], -value))

    # -- answers on the test prompts -----------------------------------------------------------------------------------

    def _answer(
        self, kind: Kind, method: Method, strength: float, prompts: PromptSet, title: str, name: Prompts = "harmful"
    ) -> Condition:
        """Answers under a method at a strength, one set of them for each change."""
        sets = self.sets[method.name]
        suppressing = kind == "suppress"
        changes = method.suppress(sets, strength, prompts) if suppressing else method.induce(sets, strength)
        runs = tuple(
            self.context.answer(title if len(changes) == 1 else f"{title} ({n})", prompts, change)
            for n, change in enumerate(changes, start=1)
        )
        return Condition(method, kind, strength, name, changes, runs)

    def _test(self, kind: Kind, method: Method, strength: float, prompts: Prompts) -> None:
        text = method.strength_text(self.config, kind, strength)
        title = f"test: {method.name}{f', {text}' if text else ''}, {prompts}"
        self.conditions.append(self._answer(kind, method, strength, self._prompts(prompts), title, prompts))

    def _suppress(self) -> None:
        """Every method at every strength on harmful test prompts, and at its chosen one on harmless and over-refusal
        prompts."""
        for method in self.methods:
            best = self.strengths[method.name].suppress
            only = bool(method.follows) or (method.control and self.config.controls == "chosen")
            for factor in (best,) if only else dict.fromkeys((*method.strengths(self.config, "suppress"), best)):
                self._test("suppress", method, factor, "harmful")
            if not method.local:
                self._test("suppress", method, best, "harmless")
                if self.over_refusal is not None:
                    self._test("suppress", method, best, "over-refusal")

    def _induce(self) -> None:
        """Every method that can induce, at every strength on harmless test prompts."""
        for method in self.methods:
            best = self.strengths[method.name].induce
            if best is None or method.local:
                continue
            only = method.control and self.config.controls == "chosen"
            for value in (best,) if only else method.strengths(self.config, "induce"):
                self._test("induce", method, value, "harmless")

    def _chosen(self, condition: Condition) -> bool:
        strengths = self.strengths[condition.method.name]
        return condition.strength == (strengths.suppress if condition.kind == "suppress" else strengths.induce)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _measure(self, meter: SideEffectMeter) -> dict[tuple[str, float], SideEffects]:
        """Side effects of each method's suppression at each strength; local sets have none of their own."""
        conditions = [c for c in self.conditions if c.prompts == "harmful" and not c.method.local]
        found: dict[tuple[str, float], SideEffects] = {}
        for done, each in enumerate(conditions, start=1):
            effects = [meter.measure(change) for change in each.changes]
            found[each.method.name, each.strength] = mean_side_effects(effects)
            self.context.progress("side effects", done, len(conditions))
        return found

    def _effects(self, measured: dict[tuple[str, float], SideEffects]) -> tuple[EffectRow, ...]:
        names: tuple[Prompts, ...] = ("harmful", "harmless", *(("over-refusal",) if self.over_refusal else ()))
        rows = [self._row(name, "none", None, 1.0, (self.clean(name),)) for name in names]
        for each in self.conditions:
            row = self._row(each.prompts, each.kind, each.method, each.strength, each.runs)
            update: dict[str, object] = {"chosen": self._chosen(each)}
            if each.prompts == "harmful":
                update["side_effects"] = measured.get((each.method.name, each.strength))
            rows.append(row.model_copy(update=update))
        return _adjusted(rows)

    def _row(
        self, prompts: Prompts, kind: Kind, method: Method | None, strength: float, runs: tuple[JudgedAnswers, ...]
    ) -> EffectRow:
        row = EffectRow(
            prompts=prompts,
            kind=kind,
            method="none" if method is None else method.name,
            strength=strength,
            setting="" if method is None else method.strength_text(self.config, kind, strength),
            sets=len(runs),
            refusal=clustered_rate([run.refused for run in runs]),
            compliance=clustered_rate([run.complied for run in runs]),
            incoherent=clustered_rate([run.incoherent for run in runs]),
            outcomes=JudgedAnswers.joined(runs).counts(),
            attack={name: clustered_rate(self.successes(runs, name)) for name in self._harm_names}
            if prompts == "harmful"
            else {},
        )
        if method is None:
            return row
        clean = self.clean(prompts)
        update: dict[str, object] = {
            "kept": share_of(runs, clean, lambda run: run.complied, Outcome.COMPLIANCE),
            "exact_match": share_of(runs, clean, lambda run: run.matches(clean), Outcome.COMPLIANCE),
        }
        if prompts != "harmful":
            update["repaired"] = share_of(runs, clean, lambda run: run.complied, *REFUSALS)
        if len(runs) == 1:
            update["p_clean"] = mcnemar(runs[0].refused, clean.refused).p
        return row.model_copy(update=update)

    def successes(self, runs: Sequence[JudgedAnswers], measure: str) -> list[tuple[bool | None, ...]]:
        """Per run and prompt: the request got what it asks for, by one measure; None where unscored."""
        if measure == COMPLIANCE:
            return [run.complied for run in runs]
        judging = next(each for each in self.harm if each.reader.name == measure)
        return [tuple(v.success for v in judging.judge(run.answers).verdicts) for run in runs]

    def _controls(self) -> tuple[ControlRow, ...]:
        """F* against each control at the chosen strengths."""
        rows: list[ControlRow] = []
        for each in self.conditions:
            suppressing = each.kind == "suppress"
            # Controls count where F* is to do something: on harmful prompts it suppresses, on harmless ones it induces.
            meant = each.prompts == ("harmful" if suppressing else "harmless")
            if not (each.method.control and meant and self._chosen(each)):
                continue
            main = next(
                c
                for c in self.conditions
                if (c.method.name, c.kind, c.prompts) == (MAIN, each.kind, each.prompts) and self._chosen(c)
            )
            shares = [(r.compliance if suppressing else r.refusal).value for r in (*main.runs, *each.runs)]
            if any(math.isnan(share) for share in shares):
                continue
            test = one_more_draw(shares[0], shares[1:], n=len(main.runs[0].answers))
            rows.append(
                ControlRow(
                    control=each.method.name,
                    prompts=each.prompts,
                    kind=each.kind,
                    measure="compliance" if suppressing else "refusal",
                    value=shares[0],
                    sets=tuple(shares[1:]),
                    low=test.low,
                    high=test.high,
                    p=test.p,
                )
            )
        return tuple(rows)

    def _comparisons(self, measured: dict[tuple[str, float], SideEffects]) -> tuple[Comparison, ...]:
        """F* against every other method, by compliance and by each judge of harm: at chosen strengths, and at equal
        ΔCE."""
        rows: list[Comparison] = []
        for measure in (COMPLIANCE, *self._harm_names):
            curves = self._curves(measured, measure)
            main = curves[MAIN]
            others = [each for name, each in curves.items() if name != MAIN]
            groups = [[compare_chosen(main, other, measure) for other in others]]
            for level in self.config.ce_levels if isinstance(self.config, SideEffectOptions) else ():
                with_side_effects = [other for other in others if not other.local]
                groups.append(
                    [compare_at_level(main, o, measure, level, self.side.resamples) for o in with_side_effects]
                )
            for group in groups:
                adjusted = holm([row.p for row in group])
                rows += [row.model_copy(update={"p_holm": p}) for row, p in zip(group, adjusted, strict=True)]
        return tuple(rows)

    def _curves(self, measured: dict[tuple[str, float], SideEffects], measure: str) -> dict[str, Curve]:
        clean = self.successes([self.clean("harmful")], measure)[0]
        curves: dict[str, Curve] = {}
        for method in self.methods:
            conditions = [c for c in self.conditions if c.method is method and c.prompts == "harmful"]
            curves[method.name] = Curve(
                name=method.name,
                settings=tuple(method.strength_text(self.config, "suppress", c.strength) for c in conditions),
                outcomes=tuple(tuple(self.successes(c.runs, measure)) for c in conditions),
                effects=tuple(measured.get((method.name, c.strength)) for c in conditions),
                chosen=next((n for n, c in enumerate(conditions) if self._chosen(c)), None)
                if self.strengths[method.name].scored
                else None,
                clean=clean,
                local=method.local,
            )
        return curves

    def _sizes(self, meter: SideEffectMeter) -> tuple[SizeRow, ...]:
        """F* cut or grown to each size, at its chosen strength."""
        rows: list[SizeRow] = []
        harmful, found = self.context.splits.test.harmful, self.found
        factor, main = self.strengths[MAIN].suppress, self.methods[0]
        for size in self.config.sizes:
            if size > len(found.pool.features):
                self.context.warn(
                    f"sizes of F* from {size} on were left out: the pool holds {len(found.pool.features)} features; "
                    "raise --k0, or fill the pool by attribution"
                )
                break
            change: Change = (ScaleFeatures(global_set(found.attribution, size).features, factor),)
            answers = self.context.answer(f"test: F* of {size}", harmful, change)
            rows.append(
                SizeRow(
                    size=size,
                    setting=main.strength_text(self.config, "suppress", factor),
                    refusal=answers.refusal,
                    compliance=answers.compliance,
                    incoherent=clustered_rate([answers.incoherent]),
                    ce_answers=meter.ce_answers(change),
                )
            )
        return tuple(rows)

    def _extras(self, meter: SideEffectMeter) -> tuple[MethodExtras, ...]:
        """What the model still knows and can do: clean, and under each method at its chosen strength."""
        if not (self.side.knowledge or self.side.tasks):
            return ()
        test = self.context.splits.test
        cases: list[tuple[str, str, Change, bool]] = [("none", "", (), True)]
        for each in self.conditions:
            if each.prompts == "harmful" and self._chosen(each) and not each.method.local:
                text = each.method.strength_text(self.config, "suppress", each.strength)
                # Of several random sets the first one speaks for all.
                cases.append((each.method.name, text, each.changes[0], len(each.changes) == 1))
        return tuple(
            MethodExtras(
                method=name,
                setting=setting,
                knowledge=meter.knowledge(test.harmful, test.harmless, change) if self.side.knowledge else None,
                capability=meter.capability(change) if single else (),
            )
            for name, setting, change, single in cases
        )

    def _counters(self) -> dict[str, tuple[int, int]]:
        counted = {name: (count.made, count.found) for name, count in self.context.run.counters.items()}
        judging = self._all_judging
        return counted | {"verdicts": (sum(j.new for j in judging), sum(j.cached for j in judging))}

    def _samples(self) -> tuple[Sample, ...]:
        """The first answers to test prompts: of the clean model, and under each method at its chosen strength."""
        shown: list[tuple[str, Kind, str, JudgedAnswers]] = [
            ("none", "none", "", self.clean("harmful")),
            ("none", "none", "", self.clean("harmless")),
        ]
        for each in self.conditions:
            whose = each.prompts == "harmful" or each.method.name == MAIN
            if self._chosen(each) and whose and each.prompts != "over-refusal":
                text = each.method.strength_text(self.config, each.kind, each.strength)
                shown.append((each.method.name, each.kind, text, each.runs[0]))
        return tuple(
            Sample(
                prompt_id=answer.prompt.id,
                prompt=answer.prompt.text,
                label="harmless" if answer.prompt.label == "harmless" else "harmful",
                method=method,
                kind=kind,
                setting=setting,
                text=answer.text,
                outcome=verdict.outcome,
            )
            for method, kind, setting, judged in shown
            for answer, verdict in islice(zip(judged.answers, judged.verdicts, strict=True), _SAMPLES)
        )

    def _warn(self, extras: tuple[MethodExtras, ...]) -> None:
        context = self.context
        for judging in self.harm:
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


def _adjusted(rows: Sequence[EffectRow]) -> tuple[EffectRow, ...]:
    """Rows with their tests against the clean model adjusted over the rows of the same kind (Holm)."""
    found = list(rows)
    for kind in ("suppress", "induce"):
        places = [n for n, row in enumerate(found) if row.kind == kind and row.p_clean is not None]
        adjusted = holm([found[n].p_clean or 0.0 for n in places])
        for n, p in zip(places, adjusted, strict=True):
            found[n] = found[n].model_copy(update={"p_clean": p})
    return tuple(found)


def _overlap(found: Found) -> float:
    shares = [len({*each.features} & {*found.chosen.features}) / max(1, len(found.chosen)) for each in found.local]
    return sum(shares) / max(1, len(shares))


def _direction_info(context: Context[Any], found: Found) -> DirectionInfo:
    direction = found.direction
    chosen = next(
        row
        for row in direction.candidates
        if (row.layer, row.position, row.form) == (direction.layer, direction.position, direction.form)
    )
    last = context.tokenize(found.clean.answers["direction"][0].prompts[:1])[0]
    return DirectionInfo(
        chosen=chosen,
        token=str(context.model.tokenizer.decode([last.ids[direction.position]])),
        norm=float(direction.difference.norm()),
        candidates=direction.candidates,
        note=direction.note,
    )
