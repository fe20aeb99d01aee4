"""Measure what probes detect: will the model refuse, is the request harmful; and keep the guard that wins."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from demur.errors import InputError
from demur.stats import Estimate, wilson
from demur.studies.base import Study
from demur.studies.config import FindConfig, Options, OverRefusalOptions, Sizes, Sources
from demur.studies.jailbreaks import AttackOptions, outcomes_of
from demur.studies.probes.results import (
    BOTH,
    CENTROIDS,
    DENSE,
    DENSE_LAST,
    FPRS,
    HARM,
    REFUSAL,
    TARGETS,
    ProbesResult,
    SetRow,
)
from demur.studies.probes.sections import probe_sections
from demur.types import PromptSet, SplitSizes

if TYPE_CHECKING:
    from demur.studies.context import Context
    from demur.studies.gauge import Gauge
    from demur.studies.pipeline import Found
    from demur.studies.probes.fitting import Fitted
    from demur.studies.probes.inputs import Sets
    from demur.studies.probes.measure import Scores
    from demur.studies.probes.results import Target

GUARD = "guard"
"""Folder of the fitted guard in the run folder."""


class ProbeOptions(Options):
    """What the probes are tested on."""

    group: ClassVar[str] = "Probes"

    benign: Sources = ()
    """Benign prompts besides the harmless test prompts, FILE or FILE::COLUMN, one row each; repeatable."""
    n_benign: int = Field(default=200, ge=1)
    """Prompts of each."""
    n_long: int = Field(default=50, ge=0)
    """Long inputs of each kind; 0 leaves them out."""
    long_words: int = Field(default=400, ge=10)
    """Words of long benign text around a request (fewer where the context is short)."""
    long_text: Sources = ()
    """Plain text for long inputs: a file or a named sample (default: benign test prompts one after the other)."""
    streaming: bool = True
    """Fit a streaming probe, and answer under it."""
    window: int = Field(default=8, ge=1)
    """Answer tokens that the streaming probe averages over."""
    paper_protocol: bool = False
    """Also report accuracies by the paper's labels (section 4.4), in which succeeded attacks count as benign."""


class Config(FindConfig, AttackOptions, OverRefusalOptions, ProbeOptions):
    """F*, harm and refusal features, and probes on them and on everything that they should be compared with."""

    # More than elsewhere: the negatives of the tuning split set the thresholds.
    n: Sizes = SplitSizes(selection=64, tuning=128)
    """Prompts per split and class, as 128,64,128,100 (direction, selection, tuning, test): direction fits, selection
    chooses layer, pooling and strength, tuning calibrates and sets thresholds."""


def run(context: Context[Any]) -> ProbesResult:
    """Find harm and refusal features, fit probes on plain prompts, and measure them on everything else."""
    from demur.studies.gauge import Gauge
    from demur.studies.pipeline import find
    from demur.studies.probes import measure
    from demur.studies.probes.fitting import Bench, winner_of
    from demur.studies.probes.inputs import Chosen, measured_sets
    from demur.studies.probes.measure import Scores

    sets = measured_sets(context)  # First, so that files that cannot be read fail before anything is computed.
    found = find(context, context.splits.choosing)
    context.watch_coherence([answer for each in found.clean.answers["tuning"] for answer in each.answers])
    gauge = Gauge.of(context, found)
    train, choice, held = (Chosen.of(found, purpose) for purpose in ("direction", "selection", "tuning"))
    bench = Bench(context, found, gauge, train, choice, held)
    with context.timed("probes"):
        harmful, refuse = context.each(partial(bench.fit, target) for target in TARGETS)
        fitted: dict[Target, dict[str, Fitted]] = {"harmful": harmful, "refuse": refuse}
    with context.timed("answers"):
        rows, refused, outcomes = _answers(context, gauge, sets)
    with context.timed("scores"):
        scores = Scores.of(bench, sets, fitted, refused, outcomes)
    winner, refuser = winner_of(fitted["harmful"]), winner_of(fitted["refuse"])
    best, matched = measure.matched_rows(scores)
    verdicts, area = measure.verdict_rows(scores, winner, refuser)
    compared = [name for name in (DENSE, DENSE_LAST, CENTROIDS, BOTH, HARM, REFUSAL) if name in fitted["harmful"]]
    negatives = int((~bench.validation.harmful).sum())
    if negatives < 1 / FPRS[0]:
        context.warn(
            f"{negatives} validation negatives set the thresholds: at 1 % that is none of them, and the rate on others "
            "may be anything up to a few percent; give more harmless prompts, and more to the tuning split with --n"
        )
    result = ProbesResult(
        sets=rows,
        probes=tuple(each.row for by_name in fitted.values() for each in by_name.values()),
        flags=tuple(measure.flag_rows(scores)),
        ranks=tuple(measure.rank_rows(scores)),
        winner=winner,
        best=best,
        matched=matched,
        held_out=tuple(measure.held_out_rows(scores, compared)),
        verdicts=verdicts,
        jailbreak_auroc=area,
        cascade=_cascade(context, scores, winner),
        reliability=tuple(measure.reliability_rows(scores, list(dict.fromkeys((winner, DENSE, BOTH))))),
        paper=tuple(measure.paper_rows(scores)) if context.config.paper_protocol else (),
        harm=gauge.harm,
        refusal=gauge.refusal,
        negatives=negatives,
    )
    return _with_guard(context, found, scores, result, refuser)


def _answers(
    context: Context[Any], gauge: Gauge, sets: Sets
) -> tuple[tuple[SetRow, ...], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """How the model answers plain, adversarial and over-refusal prompts; other sets are only scored."""
    rows: list[SetRow] = []
    refused: dict[str, np.ndarray] = {}
    outcomes: dict[str, np.ndarray] = {}
    for group in sets:
        refusal = success = Estimate.unknown()
        if group.kind in ("plain", "attack", "over-refusal"):
            judged = context.answer(group.name, group.prompts)
            refused[group.name] = np.array([np.nan if r is None else float(r) for r in judged.refused])
            refusal = judged.refusal
            if group.kind == "attack":
                became = outcomes_of(context, judged, group.prompts, gauge.refusal_ids)
                outcomes[group.name] = np.array(became)
                neither = became.count("neither")
                success = Estimate.of(wilson(became.count("succeeded"), len(became) - neither, neither))
        rows.append(
            SetRow(
                name=group.name,
                kind=group.kind,
                positive=group.positive,
                n=len(group.prompts),
                refused=refusal,
                succeeded=success,
            )
        )
    return tuple(rows), refused, outcomes


def _cascade(context: Context[Any], scores: Scores, second: str) -> Any:
    """A dense probe of the first third of the layers before the winner."""
    from demur.studies.probes import measure
    from demur.studies.probes.fitting import Representation

    n_layers = context.model.n_layers
    dense = next(each for each in scores.bench.representations if each.name == DENSE)
    shallow = tuple(reading for reading in dense.readings if reading.layers[0] < max(1, n_layers // 3))
    first = scores.bench.best(Representation("shallow dense residual", shallow), "harmful")
    return tuple(measure.cascade_rows(scores, first, second, n_layers))


def _with_guard(
    context: Context[Any], found: Found, scores: Scores, result: ProbesResult, refuser: str
) -> ProbesResult:
    """Put the guard together, measure its streaming, and write it into the run folder."""
    from demur.studies.probes.fold import make_guard, measured
    from demur.studies.probes.streaming import fit_stream, stream_row

    stream, trained = None, 0
    if context.config.streaming:
        try:
            with context.timed("streaming probe"):
                stream, trained = fit_stream(context, found, context.config.window)
        except InputError as error:
            context.warn(f"streaming was not measured: {error}")
    guard = make_guard(context, scores, result.winner, refuser, stream)
    if stream is not None:
        prompts = tuple(
            prompt
            for group in scores.sets.of("attack")
            for prompt, outcome in zip(group.prompts, scores.outcomes[group.name], strict=True)
            if outcome == "succeeded"
        )
        succeeded = PromptSet(name="succeeded attacks", prompts=prompts)
        with context.timed("streaming"):
            row = stream_row(context, guard, scores.sets, succeeded, trained)
        result = result.model_copy(update={"stream": row})
    measured(guard, result).save(context.run.folder / GUARD)
    return result


_WHY = "its probes read raw residuals and features at one place"
STUDY = Study("probes", Config, ProbesResult, run, probe_sections, residual=_WHY)
