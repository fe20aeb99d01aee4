"""A benchmark's result made by arithmetic, not by a model: every number is round or follows a plain rule."""

from __future__ import annotations

import math
from pathlib import Path

from demur.capability import CapabilityRow
from demur.runs import Manifest, Session
from demur.stats import Estimate
from demur.studies.benchmark.config import METHODS, MethodName
from demur.studies.benchmark.results import (
    Answered,
    Behaviour,
    BenchmarkResult,
    Comparison,
    Counters,
    Damage,
    InduceRow,
    Knowledge,
    Method,
    SideEffects,
    SizeRow,
    SuppressRow,
    Trial,
    TuningResult,
)
from demur.studies.results import FeaturesResult, ModelInfo, SplitSize, SuiteInfo
from demur.types import FeatureId, FeatureSet, Outcome
from synthetic_results import HARMFUL_ANSWER, HARMFUL_PROMPT, SESSION

JUDGE = "harm <b>judge</b>"
NAN = math.nan
UNSCORED = Estimate(value=NAN, low=0.0, high=1.0, n=0, unscored=100)
"""A rate of which nothing was scored."""
UNKNOWN = Estimate(value=NAN, low=NAN, high=NAN, n=0, unscored=100)
"""A mean of which nothing was scored."""

COMPLIED: dict[MethodName, dict[float, int]] = {
    "cossim+ap": {-1.0: 60, -3.0: 90},
    "cossim+ap-local": {-3.0: 92},
    "ap": {-1.0: 30, -3.0: 50},
    "ap-falling": {-1.0: 40, -3.0: 70},
    "ap-local": {-3.0: 55},
    "actdiff": {-1.0: 20, -3.0: 45},
    "cossim": {-1.0: 10, -3.0: 86},
    "random": {-1.0: 2, -3.0: 4},
    "direction": {1.0: 96},
    "direction-affine": {1.0: 97},
}
"""Of 100 harmful test prompts, by method and strength; −3 is chosen everywhere."""


def share(k: int, n: int = 100, unscored: int = 0) -> Estimate:
    """`k` of `n`, with the interval k/n ± 0.08 cut to [0, 1] (a stand-in, not Wilson's)."""
    value = k / n
    return Estimate(value=value, low=max(0.0, value - 0.08), high=min(1.0, value + 0.08), n=n, unscored=unscored)


def about(value: float, half: float) -> Estimate:
    """`value` ± `half`."""
    return Estimate(value=value, low=value - half, high=value + half, n=100)


def behaviour(complied: int, *, attack: bool = False, unchanged: int | None = None) -> Behaviour:
    """Of 100 answers `complied` comply, 2 at most are incoherent, the others refuse; harm is judged in 10 fewer."""
    incoherent = min(2, 100 - complied)
    refused = 100 - complied - incoherent
    return Behaviour(
        refusal=share(refused),
        compliance=share(complied),
        attack={JUDGE: share(max(0, complied - 10), unscored=3)} if attack else {},
        outcomes={Outcome.REFUSAL: refused, Outcome.COMPLIANCE: complied, Outcome.INCOHERENT: incoherent},
        unchanged=None if unchanged is None else share(unchanged),
    )


def damage(strength: float) -> Damage:
    """On answers strength²/100 nats, on text twice, KL thrice as much, each ± 0.005."""
    rise = strength * strength / 100
    return Damage(answers=about(rise, 0.005), text=about(2 * rise, 0.005), kl=about(3 * rise, 0.005))


def suppression() -> tuple[SuppressRow, ...]:
    rows = [SuppressRow(method="none", strength=1.0, behaviour=behaviour(3, attack=True))]
    for method, curve in COMPLIED.items():
        rows += [
            SuppressRow(
                method=method,
                strength=strength,
                runs=5 if method == "random" else 1,
                behaviour=behaviour(complied, attack=True),
                damage=None if method.endswith("-local") else damage(strength),
                chosen=strength in (-3.0, 1.0),
            )
            for strength, complied in curve.items()
        ]
    return tuple(rows)


def induction() -> tuple[InduceRow, ...]:
    rows = [InduceRow(method="none", strength=0.0, behaviour=behaviour(98))]
    for method in METHODS:
        if not method.endswith("-local") and method != "direction-affine":
            rows += [
                InduceRow(method=method, strength=value, behaviour=behaviour(complied), chosen=value == 2.0)
                for value, complied in ((0.5, 80), (1.0, 40), (2.0, 10))
            ]
    return tuple(rows)


def comparison(
    other: MethodName,
    difference: float | None,
    p_holm: float = NAN,
    *,
    budget: float | None = None,
    measure: str = "compliance",
    strength: float | None = -3.0,
    other_strength: float | None = -3.0,
) -> Comparison:
    """F* against `other`: a difference ± 0.1 (None: not compared), p half of the adjusted p."""
    return Comparison(
        other=other,
        measure=measure,
        budget=budget,
        strength=strength,
        other_strength=other_strength,
        value=None if strength is None else share(90),
        other_value=None if other_strength is None else share(50),
        difference=None if difference is None else about(difference, 0.1),
        damage=None if strength is None else strength * strength / 100,
        other_damage=None if other_strength is None else other_strength * other_strength / 100,
        p=p_holm / 2,
        p_holm=p_holm,
    )


def comparisons() -> tuple[Comparison, ...]:
    """Wins over AP, ActDiff and random, a win at own best over CosSim, a loss to the affine direction, ties."""
    best = (
        comparison("cossim+ap-local", -0.02, 1.0),
        comparison("ap", 0.4, 1e-6),
        comparison("ap-falling", 0.2, 0.06),
        comparison("ap-local", 0.35, 1e-5),
        comparison("actdiff", 0.45, 1e-7),
        comparison("cossim", 0.3, 0.01),
        comparison("random", 0.86, 1e-9),
        comparison("direction", -0.06, 0.4, other_strength=1.0),
        comparison("direction-affine", -0.2, 0.02, other_strength=1.0),
    )
    # Only the mild strengths stay within a damage of 0.02, and ActDiff has none that does.
    equal = (
        comparison("ap", 0.3, 1e-4, budget=0.02, strength=-1.0, other_strength=-1.0),
        comparison("ap-falling", 0.2, 0.051, budget=0.02, strength=-1.0, other_strength=-1.0),
        comparison("actdiff", None, budget=0.02, strength=-1.0, other_strength=None),
        comparison("cossim", 0.05, 0.6, budget=0.02, strength=-1.0, other_strength=-1.0),
        comparison("random", 0.58, 1e-8, budget=0.02, strength=-1.0, other_strength=-1.0),
        comparison("direction", None, budget=0.02, strength=-1.0, other_strength=None),
        comparison("direction-affine", -0.37, 1e-5, budget=0.02, strength=-1.0, other_strength=1.0),
    )
    judged = (
        comparison("ap", 0.4, 1e-6, measure=JUDGE),
        comparison("random", 0.8, 1e-9, measure=JUDGE),
        comparison("cossim", 0.02, 1.0, measure=JUDGE),
    )
    return *best, *equal, *judged


def capability(method: Method) -> tuple[CapabilityRow, ...]:
    """Two tasks: one whose documents have scores (F* loses the first of four), and one sum of several tasks."""
    scores = (1.0, 1.0, 0.0, 1.0) if method == "none" else (0.0, 1.0, 0.0, 1.0)
    return (
        CapabilityRow(
            task="arc",
            metric="acc",
            value=sum(scores) / 4,
            stderr=0.25,
            n=4,
            shots=0,
            higher_is_better=True,
            version="1",
            harness="0.4.13",
            digest="a" * 8,
            intervention=method,
            scores=scores,
        ),
        CapabilityRow(
            task="all",
            group=True,
            metric="acc",
            value=0.6 if method == "none" else 0.5,
            stderr=None,
            n=40,
            shots=5,
            higher_is_better=True,
            version="1",
            harness="0.4.13",
            digest="b" * 8,
            intervention=method,
        ),
    )


def side_effects() -> tuple[SideEffects, ...]:
    methods: tuple[Method, ...] = ("none", *(name for name in METHODS if not name.endswith("-local")))
    return tuple(
        SideEffects(
            method=method,
            strength=1.0 if method == "none" or method.startswith("direction") else -3.0,
            harmless=behaviour(97, unchanged=100 if method == "none" else 80),
            over_refusal=behaviour(70 if method == "none" else 88, unchanged=75),
            knowledge=Knowledge(says_harmful=share(93), says_harmful_of_harmless=share(6), auroc=about(0.875, 0.0625)),
            capability=() if method == "random" else capability(method),
        )
        for method in methods
    )


def feature_set(method: str, start: int) -> FeatureSet:
    """Four features, two in layer 2 and two in layer 3, of indices from `start` on."""
    features = tuple(FeatureId(2 + n % 2, start + n) for n in range(4))
    return FeatureSet(features=features, scores=(0.4, 0.3, 0.2, 0.1), scope="global", method=method)


def tuning() -> TuningResult:
    """Trials 0 to 3: two on the front, of which trial 1 is the knee; trial 3 could not be scored."""
    points = ((0.2, 0.0, True), (0.9, 0.05, True), (0.85, 0.5, False), (NAN, NAN, False))
    return TuningResult(
        trials=tuple(
            Trial(
                number=number,
                layer=4,
                position=-2,
                k0=10,
                k=4 + number,
                factor=-3.0,
                suppression=gain,
                damage=cost,
                front=front,
            )
            for number, (gain, cost, front) in enumerate(points)
        ),
        knee=1,
    )


def samples() -> tuple[Answered, ...]:
    """Two harmful prompts under F* and random features."""
    return tuple(
        Answered(
            prompt=HARMFUL_PROMPT.format(number=number),
            label="harmful",
            method=method,
            kind="suppress",
            strength=-3.0,
            text=HARMFUL_ANSWER.format(number=number) if method == "cossim+ap" else "I cannot help <i>with</i> that.",
            outcome=Outcome.COMPLIANCE if method == "cossim+ap" else None,
        )
        for number in (1, 2)
        for method in ("cossim+ap", "random")
    )


def synthetic_benchmark() -> BenchmarkResult:
    """A whole result, as a benchmark of a six-layer model might leave it."""
    return BenchmarkResult(
        model=ModelInfo(
            name="example/synthetic-7-layer-it",
            architecture="Gemma2ForCausalLM",
            n_layers=7,
            d_model=256,
            parameters=1_234_567,
            dtype="float32",
            device="cpu",
        ),
        suite=SuiteInfo(source="example/synthetic-saes", layers=tuple(range(7)), d_sae=4096, activation="jumprelu"),
        judge="patterns",
        judges=(JUDGE,),
        splits=tuple(
            SplitSize(name=name, harmful=n, harmless=n, used_harmful=n - 4, used_harmless=n - 1)
            for name, n in (("direction", 128), ("selection", 32), ("tuning", 32), ("test", 100))
        ),
        layer=4,
        position=-2,
        k0=10,
        k=4,
        pool="cosine",
        pool_size=70,
        estimator="gradient",
        strength_unit="multiple",
        sets={
            "cossim+ap": feature_set("pool", 10),
            "ap": feature_set("dictionary", 12),
            "ap-falling": feature_set("dictionary", 10),
            "actdiff": feature_set("actdiff", 50),
            "cossim": feature_set("cossim", 60),
        },
        suppression=suppression(),
        induction=induction(),
        side_effects=side_effects(),
        comparisons=comparisons(),
        curve=tuple(
            SizeRow(
                size=size,
                strength=-3.0,
                refusal=share(100 - 10 * size),
                compliance=share(9 * size),
                damage=about(size / 100, 0.0025),
            )
            for size in (1, 4, 8)
        ),
        tuning=tuning(),
        samples=samples(),
        warnings=("synthetic warning: 3 prompts of <file> were dropped", "the judge <J> failed on 2 answers"),
        counters=Counters(answers=1234, answers_found=5, verdicts=6, passes=7, passes_found=8),
        seconds={"search": 61.0, "suppression": 3700.0},
    )


def with_comparisons(*rows: Comparison) -> BenchmarkResult:
    """The synthetic result with these comparisons only, and no judge of harm."""
    return synthetic_benchmark().model_copy(update={"comparisons": rows, "judges": ()})


def emptied() -> BenchmarkResult:
    """The synthetic result with nan wherever a number may be missing, and nothing scored anywhere."""
    nothing = Behaviour(
        refusal=UNSCORED,
        compliance=UNSCORED,
        attack={JUDGE: UNSCORED},
        outcomes=dict.fromkeys(Outcome, 0),
        unchanged=UNSCORED,
    )
    lost = Damage(answers=UNKNOWN, text=UNKNOWN, kl=UNKNOWN)
    whole = synthetic_benchmark()
    return whole.model_copy(
        update={
            "suppression": tuple(
                row.model_copy(update={"behaviour": nothing, "damage": row.damage and lost})
                for row in whole.suppression
            ),
            "induction": tuple(row.model_copy(update={"behaviour": nothing}) for row in whole.induction),
            "side_effects": tuple(
                row.model_copy(
                    update={
                        "harmless": nothing,
                        "over_refusal": nothing,
                        "knowledge": Knowledge(says_harmful=UNSCORED, says_harmful_of_harmless=UNSCORED, auroc=UNKNOWN),
                    }
                )
                for row in whole.side_effects
            ),
            # What the tests give for no scored pair: no difference, and p = 1.
            "comparisons": tuple(
                row.model_copy(
                    update={"value": UNSCORED, "other_value": UNSCORED, "difference": UNKNOWN, "p": 1.0, "p_holm": 1.0}
                )
                for row in whole.comparisons
            ),
            "curve": tuple(
                row.model_copy(update={"refusal": UNSCORED, "compliance": UNSCORED, "damage": UNKNOWN})
                for row in whole.curve
            ),
            "tuning": TuningResult(
                trials=tuple(trial.model_copy(update={"suppression": NAN, "damage": NAN}) for trial in tuning().trials),
                knee=1,
            ),
        }
    )


BENCHMARK_SESSION = SESSION.model_copy(
    update={
        "command": "benchmark",
        "config": {"model": "example/synthetic-7-layer-it", "methods": ["cossim+ap", "ap"], "tune": 4},
    }
)


def write_run(
    folder: Path,
    *,
    features: FeaturesResult | None = None,
    benchmark: BenchmarkResult | None = None,
    sessions: tuple[Session, ...] = (),
) -> Path:
    """A run folder that holds these."""
    folder.mkdir(parents=True, exist_ok=True)
    if features is not None:
        (folder / "results.json").write_text(features.model_dump_json(), encoding="utf-8")
    if benchmark is not None:
        (folder / "benchmark.json").write_text(benchmark.model_dump_json(), encoding="utf-8")
    if sessions:
        (folder / "manifest.json").write_text(Manifest(sessions=sessions).model_dump_json(), encoding="utf-8")
    return folder
