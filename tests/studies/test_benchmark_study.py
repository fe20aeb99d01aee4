"""The benchmark study on the planted model, whose causal features are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from demur.errors import InputError
from demur.stats import Estimate, holm, mcnemar
from demur.studies import _answers
from demur.studies._answers import Answers
from demur.studies.benchmark._arms import Tuned
from demur.studies.benchmark._extras import _texts
from demur.studies.benchmark._measure import QUESTION
from demur.studies.benchmark.config import METHODS, BenchmarkConfig
from demur.studies.benchmark.results import ROWS, BenchmarkResult, Comparison, Damage, SuppressRow
from demur.studies.benchmark.study import mean_damage, run_benchmark
from demur.studies.config import PromptSource, load_config
from demur.types import Outcome, Verdict

SMALL: dict[str, Any] = {
    "suppress": (1.0, 0.0),
    "induce_multiples": (0.5, 1.0),
    "random_seeds": 3,
    "sizes": (1, 2, 500),
    "resamples": 200,
}


def config(files: Any, **changes: Any) -> BenchmarkConfig:
    return BenchmarkConfig.model_validate(files.config().model_dump() | SMALL | changes)


@pytest.fixture(scope="module")
def benched(files: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchmarkResult, Path]:
    out = tmp_path_factory.mktemp("run") / "planted"
    text = out.parent / "text.txt"
    text.write_text("\n".join(files.truth.harmless.texts[:6]), encoding="utf-8")
    looks = out.parent / "looks.jsonl"
    # Half of them are among the prompts that choose something, and must not be measured.
    looks.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in files.truth.harmless.texts), encoding="utf-8")
    sources = {"text": (PromptSource(source=str(text)),), "over_refusal": (PromptSource(source=str(looks)),)}
    return run_benchmark(config(files, **sources), out), out


def chosen(result: BenchmarkResult, method: str) -> SuppressRow:
    return next(row for row in result.suppression if row.method == method and (row.chosen or method == "none"))


def compared(result: BenchmarkResult, other: str, budget: float | None = None) -> Comparison:
    return next(row for row in result.comparisons if (row.other, row.budget) == (other, budget))


def test_f_star_and_attribution_suppress_and_the_baselines_do_not(benched: Any) -> None:
    result: BenchmarkResult = benched[0]
    assert chosen(result, "none").behaviour.refusal.value == 1.0
    for method in ("cossim+ap", "cossim+ap-local", "ap-falling", "direction"):
        row = chosen(result, method).behaviour
        assert (row.refusal.value, row.compliance.value) == (0.0, 1.0), method
    for method in ("cossim", "actdiff", "random"):
        assert chosen(result, method).behaviour.refusal.value > 0.5, method
    assert chosen(result, "random").runs == 3
    assert chosen(result, "random").behaviour.refusal.n == 3 * 20


def test_sets_are_what_selection_gives(benched: Any, files: Any) -> None:
    sets = benched[0].sets
    assert list(sets) == ["cossim+ap", "ap", "ap-falling", "actdiff", "cossim"]
    causal = files.truth.truth.causal
    assert set(sets["cossim+ap"].features) == causal
    falling = sets["ap-falling"]
    assert falling.method.startswith("dictionary")
    assert set(falling.features) == causal
    assert set(sets["cossim"].features) != causal
    assert all(len(each) == len(causal) for each in sets.values())


def test_every_method_has_its_rows(benched: Any) -> None:
    result: BenchmarkResult = benched[0]
    assert [row.method for row in result.suppression if row.chosen] == list(METHODS)
    for method in METHODS:
        strengths = [row.strength for row in result.suppression if row.method == method]
        local, direction = method.endswith("-local"), method.startswith("direction")
        assert len(strengths) == (1 if local or direction else 2), method
    induced = {row.method for row in result.induction}
    assert induced == {"none", "cossim+ap", "ap", "ap-falling", "actdiff", "cossim", "random", "direction"}
    assert result.side_effects[0].method == "none"


def test_damage_is_of_the_same_tokens_for_every_method(benched: Any) -> None:
    result: BenchmarkResult = benched[0]
    rows = [row for row in result.suppression if row.damage is not None]
    assert {row.damage.answers.n for row in rows if row.damage and row.runs == 1} == {20}
    assert {row.damage.text.n for row in rows if row.damage and row.damage.text and row.runs == 1} == {6}
    main = chosen(result, "cossim+ap").damage
    assert main is not None
    # The causal features are silent on harmless prompts.
    assert main.answers.value == pytest.approx(0.0, abs=1e-4)
    assert main.kl.value == pytest.approx(0.0, abs=1e-4)
    assert all(row.damage is None for row in result.suppression if row.method.endswith("-local"))


def test_prompts_that_chose_something_are_not_asked_for_over_refusal(benched: Any, files: Any) -> None:
    over = benched[0].side_effects[0].over_refusal
    assert over is not None
    used = 20 + 16 + 8  # direction, selection, tuning
    assert over.refusal.n == min(100, len(files.truth.harmless) - used)


def test_comparisons_are_paired_and_adjusted(benched: Any) -> None:
    result: BenchmarkResult = benched[0]
    best = [row for row in result.comparisons if row.budget is None]
    assert [row.other for row in best] == [method for method in METHODS if method != "cossim+ap"]
    assert [row.p_holm for row in best] == pytest.approx(list(holm([row.p for row in best])))
    row = compared(result, "cossim")
    assert row.difference is not None
    assert row.value is not None
    assert row.other_value is not None
    assert row.difference.value == pytest.approx(row.value.value - row.other_value.value)
    # F* alone succeeds on `only` prompts, cossim alone on none.
    only = round(row.difference.value * 20)
    assert row.p == pytest.approx(mcnemar([True] * only, [False] * only).p)
    assert row.p_holm < 0.05
    assert compared(result, "ap-falling").p == 1.0


def test_equal_damage_takes_strengths_within_the_budget_from_tuning_prompts(benched: Any) -> None:
    result: BenchmarkResult = benched[0]
    budgets = {row.budget for row in result.comparisons}
    assert budgets == {None, 0.01, 0.05, 0.2}
    for row in result.comparisons:
        assert not (row.budget is not None and row.other.endswith("-local"))
        if row.strength is None or row.other_strength is None:
            assert math.isnan(row.p)
            assert row.difference is None


def test_the_curve_stops_where_the_pool_does_and_says_so(benched: Any) -> None:
    result: BenchmarkResult = benched[0]
    assert [row.size for row in result.curve] == [1, 2]
    assert any("the pool holds" in warning for warning in result.warnings)


def test_what_was_done_is_not_done_again(benched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, out = benched
    again_config = BenchmarkConfig.model_validate(
        json.loads((out / "manifest.json").read_text())["sessions"][-1]["config"]
    )
    monkeypatch.setattr("demur.studies._answers.answer_batches", _never)
    for name in ("token_losses", "first_token_kl", "preference"):
        monkeypatch.setattr(f"demur.studies.benchmark._measure.{name}", _never)
    again = run_benchmark(again_config, out)
    same = {"seconds": {}, "counters": result.counters, "peak_memory": 0}
    assert again.model_copy(update=same) == result.model_copy(update=same)
    assert (again.counters.answers, again.counters.passes) == (0, 0)
    assert again.counters.answers_found == result.counters.answers
    assert again.counters.passes_found == result.counters.passes
    assert BenchmarkResult.model_validate_json((out / ROWS).read_bytes()) == again


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("computed again")


def few(files: Any, **changes: Any) -> BenchmarkConfig:
    """The smallest benchmark that has every stage."""
    sizes = {"n_direction": 12, "n_selection": 6, "n_tuning": 4, "n_test": 6, "sizes": (2,), "random_seeds": 2}
    once = {"suppress": (0.0,), "induce_multiples": (1.0,), "methods": ("cossim", "random"), "knowledge": False}
    return config(files, **sizes, **once, **changes)


@pytest.fixture(scope="module")
def whole(files: Any, tmp_path_factory: pytest.TempPathFactory) -> BenchmarkResult:
    return run_benchmark(few(files), tmp_path_factory.mktemp("run") / "whole")


@pytest.mark.parametrize("stop", [6, 40, 52])
def test_interrupted_anywhere_no_answer_is_written_twice(
    files: Any, whole: BenchmarkResult, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, str]] = []
    real: Callable[..., Iterator[Any]] = _answers.answer_batches

    def counted(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in real(*arguments, **options):
            written.extend((answer.intervention, answer.prompt.id) for answer in batch)
            yield batch

    monkeypatch.setattr(_answers, "answer_batches", counted)
    calls: list[str] = []

    def interrupt(stage: str, _done: int, _total: int) -> None:
        calls.append(stage)
        if len(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_benchmark(few(files), tmp_path / "run", interrupt)
    before = len(written)
    result = run_benchmark(few(files), tmp_path / "run")
    assert 0 < before < len(written)
    assert result.counters.answers == len(written) - before
    assert len(written) == whole.counters.answers
    same = {"seconds": {}, "counters": whole.counters, "peak_memory": 0}
    assert result.model_copy(update=same) == whole.model_copy(update=same)


class Flaky:
    """A judge of harm that dies after some rows, as one behind an endpoint may."""

    name = "flaky"
    identity: ClassVar[dict[str, Any]] = {"kind": "flaky"}

    def __init__(self, lasts: int) -> None:
        self.left = lasts
        self.read: list[tuple[str, str]] = []

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        from demur.judges import JudgeStopped

        found: list[Verdict] = []
        for prompt, response in zip(prompts, responses, strict=True):
            if self.left == 0:
                raise JudgeStopped("the endpoint is gone; start it and run again", verdicts=found)
            self.left -= 1
            self.read.append((prompt, response))
            found.append(Verdict(outcome=None, judge=self.name, harmful="sorry" not in response.lower()))
        return found


def test_a_failing_judge_never_becomes_a_score_and_a_rerun_completes_it(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = few(files, judges=("flaky",))
    first, second = Flaky(4), Flaky(10_000)
    monkeypatch.setattr("demur.studies.benchmark.study.get_judge", lambda _name: first)
    result = run_benchmark(asked, tmp_path / "run")
    attacks = [row.behaviour.attack["flaky"] for row in result.suppression]
    assert sum(attack.unscored for attack in attacks) > 0
    assert [attack.n + attack.unscored for attack in attacks] == [6 * row.runs for row in result.suppression]
    assert any(
        "the endpoint is gone" in warning and "run the same command again" in warning for warning in result.warnings
    )
    monkeypatch.setattr("demur.studies.benchmark.study.get_judge", lambda _name: second)
    done = run_benchmark(asked, tmp_path / "run")
    assert all(row.behaviour.attack["flaky"].unscored == 0 for row in done.suppression)
    assert not [warning for warning in done.warnings if "flaky" in warning]
    assert len(first.read) == 4
    # Equal pairs of prompt and answer are read once, and none of the first four again.
    assert not set(first.read) & set(second.read)
    assert len(second.read) == len(set(second.read)) == done.counters.verdicts
    assert {row.measure for row in done.comparisons} == {"compliance", "flaky"}


def test_a_judge_given_twice_is_refused(files: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give each once"):
        run_benchmark(config(files, judges=("patterns", "patterns")), tmp_path / "run")


@pytest.mark.parametrize("pool", ["attribution", "union"])
def test_pools_by_attribution_find_the_causal_features_too(files: Any, tmp_path: Path, pool: str) -> None:
    from demur.studies.features import run_features

    result = run_features(files.config(pool=pool, n_exact=0), tmp_path / "run")
    assert {row.feature for row in result.features} == files.truth.truth.causal
    per_layer = 10 * len(result.suite.layers)
    assert result.pool_size == per_layer if pool == "attribution" else result.pool_size > 0


def test_the_strength_within_a_budget_complies_most_and_damages_least_of_equals() -> None:
    tuned = Tuned(
        compliance={0.5: 0.3, 0.0: 0.9, -1.0: 0.9, -3.0: 1.0, -5.0: math.nan},
        damage={0.5: 0.0, 0.0: 0.04, -1.0: 0.05, -3.0: 0.3, -5.0: 0.0},
        best=-3.0,
    )
    assert tuned.within(0.01) == 0.5
    assert tuned.within(0.05) == 0.0
    assert tuned.within(0.3) == -3.0
    assert tuned.within(-1.0) is None


def test_damage_over_random_sets_has_students_interval_by_hand() -> None:
    def of(value: float) -> Damage:
        one = Estimate(value=value, low=value, high=value, n=20)
        return Damage(answers=one, text=None, kl=one)

    assert mean_damage([of(0.5)]) == of(0.5)
    found = mean_damage([of(0.1), of(0.2), of(0.6)]).answers
    # Standard deviation .2646 of three, t with 2 degrees of freedom 4.303.
    assert found.value == pytest.approx(0.3)
    assert found.high - found.value == pytest.approx(4.303 * 0.26458 / 3**0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": (PromptSource(source="nowhere.txt"),)}, "nowhere.txt"),
        ({"over_refusal": (PromptSource(source="nowhere.jsonl"),)}, "nowhere.jsonl"),
        ({"judges": ("nobody",)}, "nobody"),
    ],
)
def test_what_is_named_wrongly_is_found_before_anything_is_computed(
    files: Any, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    stages: list[str] = []
    with pytest.raises(InputError, match=words):
        run_benchmark(config(files, **changes), tmp_path / "run", lambda stage, *_: stages.append(stage))
    assert set(stages) <= {"loading"}


def test_every_text_source_has_its_share(files: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} text {n}" for n in range(9)), encoding="utf-8")
    sources = tuple(PromptSource(source=str(tmp_path / f"{name}.txt")) for name in ("a", "b"))
    texts = _texts(config(files, text=sources, n_text=5))
    assert texts == ("a text 0", "a text 1", "a text 2", "b text 0", "b text 1")


def test_a_small_pool_limits_every_set_and_says_so(files: Any, tmp_path: Path) -> None:
    result = run_benchmark(few(files, k0=1, k=11), tmp_path / "run")
    assert {len(each) for each in result.sets.values()} == {4}
    assert result.k == 4
    assert any("the pool holds 4 features" in warning for warning in result.warnings)


def test_compliance_is_the_outcome_even_where_the_judge_tells_harm() -> None:
    verdicts = tuple(Verdict(outcome=Outcome.COMPLIANCE, judge="both", harmful=False) for _ in range(2))
    answers = Answers((), (), (*verdicts, Verdict(outcome=None, judge="both", harmful=True)))
    assert answers.complied == (True, True, None)
    assert answers.compliance.value == 1.0


def test_the_papers_strength_joins_those_that_are_tried() -> None:
    asked = BenchmarkConfig(suppress=(0.0, -1.0))
    assert asked.with_settings({"suppress": (-3.0,), "k": 20}).suppress == (-3.0, 0.0, -1.0)


def test_configuration_puts_f_star_first_and_reads_toml(tmp_path: Path) -> None:
    assert BenchmarkConfig(methods=("random", "cossim")).methods == ("cossim+ap", "random", "cossim")
    assert BenchmarkConfig(methods=("ap-local",)).methods == ("cossim+ap", "ap-local", "ap")
    assert BenchmarkConfig(sizes=(5, 1, 5)).sizes == (1, 5)
    path = tmp_path / "benchmark.toml"
    path.write_text('methods = ["ap"]\nrandom_seeds = 2\n', encoding="utf-8")
    found = load_config(path, {"random_seeds": 4}, BenchmarkConfig)
    assert (found.methods, found.random_seeds) == (("cossim+ap", "ap"), 4)


def test_the_question_holds_the_request() -> None:
    assert QUESTION.format(prompt="bake bread").endswith("Request: bake bread")


@pytest.mark.eval
def test_capability_is_measured_under_each_method_and_once(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = files.truth.harmless.texts[0].split()
    documents = [{"query": words[n], "choices": [words[0], words[1]], "gold": n % 2} for n in range(3)]
    (tmp_path / "pick.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    task = {
        "task": "pick",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "pick.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    # JSON is YAML.
    (tmp_path / "pick.yaml").write_text(json.dumps(task), encoding="utf-8")
    asked = few(files, tasks=(str(tmp_path / "pick.yaml"),), task_limit=2)
    result = run_benchmark(asked, tmp_path / "run")
    measured = {row.method: row.capability for row in result.side_effects}
    assert set(measured) == {"none", "cossim+ap", "cossim", "random"}
    # Several random sets have no one capability.
    assert measured.pop("random") == ()
    for method, (row, *_) in measured.items():
        assert (row.task, row.metric, row.n) == ("pick", "acc", 2)
        assert (row.intervention == "none") == (method == "none")
    assert len({row.digest for rows in measured.values() for row in rows}) == 1
    with monkeypatch.context() as patched:
        patched.setattr("demur.capability.measure_capability", _never)
        assert run_benchmark(asked, tmp_path / "run").side_effects == result.side_effects
    # Other questions in the task's data are other questions.
    documents[0]["gold"] = 1
    (tmp_path / "pick.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr("demur.capability.measure_capability", _never)
        with pytest.raises(AssertionError, match="computed again"):
            run_benchmark(asked, tmp_path / "run")
