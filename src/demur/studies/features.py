"""Study `features`: which SAE features make this model refuse, and the proof (paper, sections 3 and 4.1).

prompts → baseline answers → refusal tokens → direction → pool → attribution → F* → strengths (tuning prompts)
→ suppression and induction (test prompts) → results.

Each step is a stage of the run folder, keyed by everything that it depends on, so the same command resumes.
"""

from __future__ import annotations

from pathlib import Path

from demur.runs import write_text
from demur.studies._context import Study
from demur.studies._finding import compare_estimators, find_features, measure_activations, start_answering
from demur.studies._judging import Progress
from demur.studies._summary import feature_rows, make_result
from demur.studies._validation import validate
from demur.studies.config import StudyConfig
from demur.studies.results import FeaturesResult

RESULTS = "results.json"


def run_features(config: StudyConfig, out: Path, progress: Progress | None = None) -> FeaturesResult:
    """Run the study, or resume it, in the folder `out`, and write `results.json` there.

    Args:
        config: what to study; without a model, the bundled one.
        out: run folder, made if missing.
        progress: called with (stage, done, total).

    Raises:
        DemurError: inputs that do not fit, or a model that never refuses; nothing computed before is lost.
    """
    with Study.opened(config, out, progress, kind="study") as study:
        result = _run(study)
        write_text(study.run.folder / RESULTS, result.model_dump_json(indent=1))
    return result


def _run(study: Study) -> FeaturesResult:
    answering = start_answering(study)
    found = find_features(study, answering)
    baseline, direction, pool, chosen = found.baseline, found.direction, found.pool, found.chosen
    with study.timed("exact patching"):
        estimators, exact = compare_estimators(study, baseline, direction, pool)
    with study.timed("activations"):
        activations, control = measure_activations(study, baseline, chosen, pool)
    with study.timed("validation"):
        effects, samples = validate(study, answering, baseline, direction, chosen, control, activations)
    if answering.judging.warning:
        study.warnings.append(answering.judging.warning)
    return make_result(
        study.inputs,
        direction=direction,
        tokens=baseline.tokens,
        pool=pool,
        splits=baseline.sizes,
        features=feature_rows(chosen, pool, exact, activations),
        estimators=estimators,
        local=found.local,
        chosen=chosen,
        effects=effects,
        samples=samples,
        config=study.config,
        warnings=study.warnings,
        seconds=study.seconds,
    )


__all__ = ["RESULTS", "run_features"]
