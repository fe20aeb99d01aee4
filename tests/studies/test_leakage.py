"""No test prompt chooses anything, and whatever a number depends on is part of its key."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from planted_study import write_prompts

from demur.errors import ModelError
from demur.studies.results import CompareResult


def stages(out: Path) -> set[str]:
    """Names of a run folder's stages: what they are, and the hash of all that they depend on."""
    return {path.name for path in (out / "stages").iterdir()}


FEW = {"induce_multiples": "1", "sizes": "", "knowledge": False, "resamples": 100}
FEWEST = {"methods": ("random",)}
CHOSEN = ("direction", "features", "sets", "refusal_tokens", "pool_size", "local_overlap", "without_signal", "trials")


def split_files(files: Any, folder: Path, test: slice) -> dict[str, Any]:
    """Options with test prompts of their own: `test` of the prompts that the other splits do not hold."""
    folder.mkdir()
    options: dict[str, Any] = {}
    for label in ("harmful", "harmless"):
        texts = getattr(files.truth, label).texts
        options[label] = str(write_prompts(folder / f"{label}.jsonl", texts[:40]))
        options[f"test_{label}"] = str(write_prompts(folder / f"test-{label}.jsonl", texts[40:][test]))
    return options


def chosen(result: CompareResult) -> str:
    """Everything that was chosen, byte for byte: features with their scores, strengths, control sets' sizes."""
    dump = result.model_dump(mode="json")
    found = {name: dump[name] for name in CHOSEN}
    # What is patched exactly is measured on test prompts.
    found["features"] = [{**row, "exact": None} for row in found["features"]]
    found["strengths"] = [[r.method, r.kind, r.strength] for r in result.effects if r.chosen]
    return json.dumps(found, sort_keys=True)


@pytest.mark.parametrize(
    ("study", "options"),
    [
        ("study", {"induce_multiples": "0.5,1"}),
        ("benchmark", {**FEW, "methods": ("ap", "cossim", "actdiff", "random")}),
        pytest.param("benchmark", {**FEW, "tune": 3, "methods": ("cossim",)}, marks=pytest.mark.eval),
    ],
)
def test_other_test_prompts_choose_the_same(files: Any, tmp_path: Path, study: str, options: dict[str, Any]) -> None:
    sizes = {"n": "16,10,8,8", "n_exact": 2, "suppress": "0.5,0", "random_sets": 2, **options}
    results: list[CompareResult] = []
    sets: list[set[str]] = []
    for number, part in enumerate((slice(0, 8), slice(8, 16))):
        named = split_files(files, tmp_path / f"prompts-{number}", part)
        out = tmp_path / f"run-{number}"
        results.append(files.study(out, study, **sizes, **named))
        # The controls' sets too: what is stored must be the same files.
        sets.append(
            {p.name for p in (out / "stages").iterdir() if p.name.startswith(("feature_sets", "pool", "direction"))}
        )
    first, second = results
    assert first.samples != second.samples
    assert chosen(first) == chosen(second)
    assert sets[0] == sets[1]


@pytest.mark.parametrize(
    ("changes", "repeated"),
    [
        ({"max_new_tokens": 6}, "answers"),
        ({"dtype": "bfloat16"}, "answers"),
        ({"seed": 1}, "answers"),
        ({"kl_threshold": 0.5}, "direction"),
        ({"direction_layer": 1, "direction_position": -1}, "direction"),
        ({"k0": 5}, "pool"),
        ({"estimator": "ig", "steps": 4}, "attribution"),
        ({"random_sets": 3}, "feature_sets"),
        ({"layers": "0-2"}, "pool"),
    ],
)
def test_what_a_number_depends_on_is_part_of_its_key(
    files: Any, run_once: Path, changes: dict[str, Any], repeated: str
) -> None:
    before = stages(run_once)
    # Under another system prompt the planted model may not refuse: its answers are new all the same.
    with contextlib.suppress(ModelError):
        files.study(run_once, **files.small(**FEWEST, **changes))
    added = stages(run_once) - before
    assert any(name.startswith(f"{repeated}-") for name in added), f"{changes} gave no new {repeated} stage"


@pytest.fixture(scope="module")
def run_once(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("keys") / "run"
    files.study(out, **files.small(**FEWEST))
    return out
