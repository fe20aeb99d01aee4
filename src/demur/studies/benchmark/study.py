"""Study `benchmark`: does suppressing F* work, against which baseline, and at what cost (paper, section 4.1).

F* → baselines → strengths of each method (tuning prompts) → suppression, damage and induction (test prompts) → side
effects at the chosen strengths → curve over sizes of F* → paired comparisons, each method at its best and at equal
damage.

Answers, verdicts and measurements are stages of the run folder, so that the same command resumes and repeats none of
them, and a features study in the same folder shares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from demur.capability import CapabilityRow, task_identity
from demur.judges import get_judge
from demur.method.interventions import Compiled, intervention_id
from demur.method.selection import global_set
from demur.model import peak_memory
from demur.runs import write_text
from demur.stats import Estimate, clustered_rate, mean_of_runs
from demur.studies._answers import Answering, Answers
from demur.studies._context import Study
from demur.studies._finding import Found, find_features, start_answering
from demur.studies._judging import Judging, Progress
from demur.studies._summary import model_info, suite_info
from demur.studies.benchmark._arms import (
    COMPLIANCE,
    Arm,
    Bench,
    Readings,
    Tuned,
    parent,
    tune_factor,
    tune_random,
    tune_value,
)
from demur.studies.benchmark._compare import compare
from demur.studies.benchmark._extras import Extras
from demur.studies.benchmark._measure import Measures
from demur.studies.benchmark._methods import Change, Methods
from demur.studies.benchmark.config import LOCAL, MAIN, BenchmarkConfig, MethodName
from demur.studies.benchmark.results import (
    ROWS,
    Answered,
    BenchmarkResult,
    Comparison,
    Counters,
    Damage,
    InduceRow,
    SideEffects,
    SizeRow,
    SuppressRow,
    TuningResult,
)
from demur.types import PromptSet

_SAMPLES = 3


def run_benchmark(config: BenchmarkConfig, out: Path, progress: Progress | None = None) -> BenchmarkResult:
    """Run the study, or resume it, in the folder `out`, and write `benchmark.json` there.

    Args:
        config: what to compare; without a model, on the bundled one.
        out: run folder, made if missing; one that holds a features study of the same model is shared.
        progress: called with (stage, done, total).

    Raises:
        DemurError: inputs that do not fit, or a model that never refuses; nothing computed before is lost.
    """
    judges = [get_judge(name) for name in config.judges]
    with Study.opened(config, out, progress, kind="benchmark") as study:
        assert isinstance(study.config, BenchmarkConfig)
        result = _Benchmark(study, study.config, Readings(study, judges)).run()
        write_text(study.run.folder / ROWS, result.model_dump_json(indent=1))
    return result


@dataclass
class _Benchmark:
    study: Study
    config: BenchmarkConfig
    readings: Readings
    arms: dict[tuple[MethodName, float], Arm] = field(default_factory=dict[tuple[MethodName, float], Arm])
    """Suppression on harmful test prompts."""

    def run(self) -> BenchmarkResult:
        study = self.study
        # Everything named is read before anything is computed: a mistake in it must not cost hours.
        extras = Extras.read(self.config, study)
        answering = start_answering(study)
        tuning = self._tune(answering)
        found = find_features(study, answering)
        methods = Methods(study, self.config, found)
        bench = Bench(self.config, answering, methods)
        base_harmful, base_harmless = found.baseline.answers["test"]
        measures = Measures(study, self.config, base_harmless, extras.texts)
        on_tuning = Measures(study, self.config, found.baseline.answers["tuning"][1], passes=measures.passes)
        if len(found.chosen) < self.config.k:
            study.warnings.append(
                f"the pool holds {len(found.chosen)} features, so F* and all other sets have that size instead of "
                f"{self.config.k}; raise k0"
            )
        with study.timed("features of the baselines"):
            sets = methods.sets
        with study.timed("tuning"):
            tuned = self._strengths(bench, found.baseline.answers["tuning"][1], on_tuning, tuning)
        with study.timed("suppression"):
            self._suppress(bench, tuned)
        with study.timed("induction"):
            induced = self._induce(bench)
        with study.timed("side effects"):
            sides = self._sides(bench, found, tuned, extras.over_refusal)
        with study.timed("sizes of F*"):
            sized = self._sized(bench, found, tuned[MAIN].best, measures)
        with study.timed("damage"):
            suppression = self._suppression_rows(measures, tuned, base_harmful)
            side_effects = self._side_rows(sides, measures)
        with study.timed("comparisons"):
            comparisons = self._compare(suppression, tuned)
        judges = (answering.judging, *self.readings.judging.values())
        for judging in judges:
            judging.close()
        self._warn(side_effects, judges)
        return BenchmarkResult(
            model=model_info(study.inputs),
            suite=suite_info(study.inputs),
            judge=study.inputs.judge.name,
            judges=tuple(judge.name for judge in self.readings.judges),
            splits=found.baseline.sizes,
            layer=found.direction.layer,
            position=found.direction.position,
            k0=self.config.k0,
            k=len(found.chosen),
            pool=self.config.pool,
            pool_size=len(found.pool.features),
            estimator=self.config.estimator,
            strength_unit="multiple" if self.config.induce is None else "value",
            sets=sets,
            suppression=suppression,
            induction=self._induction_rows(induced, base_harmless),
            side_effects=side_effects,
            comparisons=comparisons,
            curve=sized,
            tuning=tuning,
            samples=self._samples(base_harmful, sides, induced, tuned),
            warnings=tuple(dict.fromkeys(study.warnings)),
            counters=Counters(
                answers=answering.written,
                answers_found=answering.found,
                verdicts=sum(judging.made for judging in judges),
                verdicts_found=sum(judging.found for judging in judges),
                passes=measures.passes.made,
                passes_found=measures.passes.found,
            ),
            spent={judging.judge.name: judging.spent for judging in judges if judging.spent},
            seconds=study.seconds,
            peak_memory=peak_memory(study.inputs.model.device),
        )

    def _strengths(
        self, bench: Bench, base: Answers, measures: Measures, tuning: TuningResult | None
    ) -> dict[MethodName, Tuned]:
        """Each method's strengths on the tuning prompts; F*'s best is the search's, where there was one."""
        split, tuned = self.study.inputs.splits.tuning, dict[MethodName, Tuned]()
        for name in bench.methods.shared:
            tuned[name] = tune_factor(bench, name, split, base, measures)
            if not tuned[name].scored:
                self.study.warnings.append(
                    f"none of the tuning answers under {name} could be scored, so it has no best strength; the "
                    "first one is shown, and not compared"
                )
        if tuning is not None and tuning.taken is not None:
            tuned[MAIN] = replace(tuned[MAIN], best=tuning.taken.factor)
        if "random" in self.config.methods:
            tuned["random"] = tune_random(bench, tuned[MAIN], split.harmful, measures)
        return tuned

    def _suppress(self, bench: Bench, tuned: Mapping[MethodName, Tuned]) -> None:
        """Every method at every strength on the harmful test prompts; local sets at their global one's best only."""
        harmful = self.study.inputs.splits.test.harmful
        for name in self.config.methods:
            factors = (tuned[parent(name)].best,) if name in LOCAL else bench.factors(name)
            for factor in factors:
                self.arms[name, factor] = bench.suppress(name, factor, harmful, "test")

    def _induce(self, bench: Bench) -> list[tuple[Arm, bool]]:
        """Every method with a global set, or a direction, at every strength on the harmless test prompts, and which of
        the strengths the tuning prompts chose."""
        splits = self.study.inputs.splits
        found: list[tuple[Arm, bool]] = []
        best: dict[MethodName, float] = {}
        for name in self.config.methods:
            if name in LOCAL or name == "direction-affine":
                continue  # A local set is chosen for a refusal; both forms add the same direction.
            if name != "random":
                best[name] = tune_value(bench, name, splits.tuning.harmless)
            for value in bench.values(name):
                arm = bench.induce(name, value, splits.test.harmless, "test")
                found.append((arm, value == best.get(name, best.get(MAIN))))
        return found

    def _sides(
        self, bench: Bench, found: Found, tuned: Mapping[MethodName, Tuned], others: PromptSet | None
    ) -> list[_Side]:
        """Answers to harmless and to harmful-looking prompts, clean and at each method's best strength."""
        harmless = self.study.inputs.splits.test.harmless
        base = None if others is None else bench.answering.answer("over-refusal: none", others)
        found_sides = [
            _Side(
                Arm("none", "none", 1.0, ((),), (found.baseline.answers["test"][1],)),
                None if base is None else Arm("none", "none", 1.0, ((),), (base,)),
            )
        ]
        for name in self.config.methods:
            if name in LOCAL:
                continue
            factor = tuned[parent(name)].best
            found_sides.append(
                _Side(
                    bench.suppress(name, factor, harmless, "harmless"),
                    None if others is None else bench.suppress(name, factor, others, "over-refusal"),
                )
            )
        return found_sides

    def _sized(self, bench: Bench, found: Found, factor: float, measures: Measures) -> tuple[SizeRow, ...]:
        """F* cut or grown to each size, at its best strength."""
        rows: list[SizeRow] = []
        harmful = self.study.inputs.splits.test.harmful
        for size in self.config.sizes:
            if size > len(found.pool.features):
                self.study.warnings.append(
                    f"sizes of F* from {size} on were left out: the pool holds {len(found.pool.features)} features; "
                    "raise k0, or fill the pool by attribution"
                )
                break
            features = global_set(found.attribution, size)
            change = bench.methods.scaled(features, factor)
            answers = bench.answering.answer(f"test: F* of {size}", harmful, change)
            rows.append(
                SizeRow(
                    size=size,
                    strength=factor,
                    refusal=clustered_rate([answers.refused]),
                    compliance=clustered_rate(self.readings.successes([answers], COMPLIANCE)),
                    damage=measures.answers_rise(change),
                )
            )
        return tuple(rows)

    def _suppression_rows(
        self, measures: Measures, tuned: Mapping[MethodName, Tuned], base: Answers
    ) -> tuple[SuppressRow, ...]:
        rows = [SuppressRow(method="none", strength=1.0, behaviour=self.readings.behaviour([base]))]
        for done, ((name, factor), arm) in enumerate(self.arms.items(), start=1):
            damages = [] if name in LOCAL else [measures.damage(change) for change in arm.changes]
            rows.append(
                SuppressRow(
                    method=name,
                    strength=factor,
                    runs=len(arm.runs),
                    behaviour=self.readings.behaviour(arm.runs),
                    damage=mean_damage(damages) if damages else None,
                    chosen=factor == tuned[parent(name)].best,
                )
            )
            self.study.progress("damage", done, len(self.arms))
        return tuple(rows)

    def _induction_rows(self, induced: list[tuple[Arm, bool]], base: Answers) -> tuple[InduceRow, ...]:
        rows = [InduceRow(method="none", strength=0.0, behaviour=self.readings.outcomes([base]))]
        return (
            *rows,
            *(
                InduceRow(
                    method=arm.method,
                    strength=arm.strength,
                    runs=len(arm.runs),
                    behaviour=self.readings.outcomes(arm.runs),
                    chosen=best,
                )
                for arm, best in induced
            ),
        )

    def _side_rows(self, sides: list[_Side], measures: Measures) -> tuple[SideEffects, ...]:
        test = self.study.inputs.splits.test
        base, over = sides[0].harmless.runs[0], sides[0].over_refusal
        rows: list[SideEffects] = []
        for side in sides:
            change = side.harmless.changes[0]
            single = len(side.harmless.changes) == 1
            rows.append(
                SideEffects(
                    method=side.harmless.method,
                    strength=side.harmless.strength,
                    harmless=self.readings.outcomes(side.harmless.runs, base),
                    over_refusal=None
                    if side.over_refusal is None or over is None
                    else self.readings.outcomes(side.over_refusal.runs, over.runs[0]),
                    # Of several random sets the first one speaks for all.
                    knowledge=measures.knowledge(test.harmful, test.harmless, change)
                    if self.config.knowledge
                    else None,
                    capability=self._capability(change) if single else (),
                )
            )
        return tuple(rows)

    def _capability(self, change: Change) -> tuple[CapabilityRow, ...]:
        """Tasks of lm-evaluation-harness under a change, each once per run folder."""
        study, config = self.study, self.config
        rows: list[CapabilityRow] = []
        for task in config.tasks:
            depends = {
                "model": study.identity,
                "saes": study.inputs.suite.identity if change else None,
                "intervention": intervention_id(change),
                "task": task_identity(task),
                "limit": config.task_limit,
                "seed": config.seed,
            }
            stage = study.run.stage("capability", depends)
            if not stage.done:
                from demur.capability import measure_capability

                study.progress(f"capability: {task}", 0, 1)
                compiled = Compiled(study.inputs.model, study.inputs.suite, change) if change else None
                found = measure_capability(
                    study.inputs.model, [task], compiled, limit=config.task_limit, seed=config.seed
                )
                stage.save_values("rows", found)
                stage.finish()
                study.progress(f"capability: {task}", 1, 1)
            rows += stage.load_values("rows", CapabilityRow)
        return tuple(rows)

    def _compare(
        self, suppression: tuple[SuppressRow, ...], tuned: Mapping[MethodName, Tuned]
    ) -> tuple[Comparison, ...]:
        damages: dict[tuple[MethodName, float], float] = {}
        for row in suppression:
            if row.damage is not None and row.method != "none":
                damages[row.method, row.strength] = row.damage.answers.value
        measures = (COMPLIANCE, *(judge.name for judge in self.readings.judges))
        return tuple(
            row
            for measure in measures
            for row in compare(self.config, self.arms, damages, tuned, self.readings, measure)
        )

    def _samples(
        self,
        base: Answers,
        sides: Sequence[_Side],
        induced: Sequence[tuple[Arm, bool]],
        tuned: Mapping[MethodName, Tuned],
    ) -> tuple[Answered, ...]:
        """The first answers to test prompts: harmful ones clean and under each method at its best strength,
        harmless ones clean, and while F* is suppressed and induced."""
        shown = [Arm("none", "none", 1.0, ((),), (base,))]
        shown += [arm for (name, factor), arm in self.arms.items() if factor == tuned[parent(name)].best]
        shown += [side.harmless for side in sides if side.harmless.method in ("none", MAIN)]
        shown += [arm for arm, best in induced if best and arm.method == MAIN]
        found: list[Answered] = []
        for arm in shown:
            answers = arm.runs[0]
            rows = zip(answers.prompts, answers.generations, answers.verdicts, strict=True)
            found += [
                Answered(
                    prompt=prompt.text,
                    label=prompt.label or "harmful",
                    method=arm.method,
                    kind=arm.kind,
                    strength=arm.strength,
                    text=generation.text,
                    outcome=verdict.outcome,
                )
                for prompt, generation, verdict in islice(rows, _SAMPLES)
            ]
        return tuple(found)

    def _tune(self, answering: Answering) -> TuningResult | None:
        if not self.config.tune:
            return None
        from demur.studies.benchmark._tuning import search

        with self.study.timed("search"):
            result, config = search(self.study, self.config, answering)
        self.config = self.study.config = config
        return result

    def _warn(self, sides: tuple[SideEffects, ...], judges: Sequence[Judging]) -> None:
        warnings = self.study.warnings
        warnings += [judging.complaint for judging in judges if judging.complaint]
        known = sides[0].knowledge
        if self.config.knowledge and known is None:
            warnings.append("yes and no begin with the same token, so the model was not asked what it knows")
        elif known is not None and known.auroc.low <= 0.5:
            warnings.append(
                "asked whether requests are harmful, the clean model does no better than chance (AUROC "
                f"{known.auroc.value:.2f}), so that question says nothing about the methods"
            )


@dataclass(frozen=True)
class _Side:
    """Answers under one method's best strength, besides those to harmful prompts."""

    harmless: Arm
    over_refusal: Arm | None


def mean_damage(damages: Sequence[Damage]) -> Damage:
    """Damage of one change, or the mean over random sets.

    Several: the interval is that of the sets' own means (Student's t over sets), the larger source of variation.
    """
    if len(damages) == 1:
        return damages[0]

    def over(values: Sequence[Estimate]) -> Estimate:
        return mean_of_runs([value.value for value in values], n=values[0].n)

    texts = [damage.text for damage in damages if damage.text is not None]
    return Damage(
        answers=over([damage.answers for damage in damages]),
        text=over(texts) if texts else None,
        kl=over([damage.kl for damage in damages]),
    )


__all__ = ["run_benchmark"]
