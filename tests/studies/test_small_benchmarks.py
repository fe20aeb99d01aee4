"""Small benchmarks on the planted model: resuming, judges that fail, options."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from planted_study import effect, lasting

from demur.errors import InputError
from demur.judges import JUDGES, Judge, JudgeStopped, PatternJudge, Reading
from demur.studies.results import CompareResult
from demur.types import Answer, Verdict


def few(files: Any, **changes: Any) -> dict[str, Any]:
    """The smallest benchmark that has every stage."""
    return files.small(
        **{"sizes": "2", "methods": ("cossim", "random"), "knowledge": False, "resamples": 200, **changes}
    )


@pytest.fixture(scope="module")
def whole(files: Any, tmp_path_factory: pytest.TempPathFactory) -> CompareResult:
    return files.study(tmp_path_factory.mktemp("run") / "whole", "benchmark", **few(files))


@pytest.mark.parametrize("stop", [6, 30, 44])
def test_interrupted_anywhere_no_answer_is_written_twice(
    files: Any, whole: CompareResult, tmp_path: Path, stop: int
) -> None:
    calls: list[str] = []

    def interrupt(stage: str, _done: int, _total: int) -> None:
        calls.append(stage)
        if len(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.study(tmp_path / "run", "benchmark", interrupt, **few(files))
    before = sum(path.read_text().count("\n") for path in (tmp_path / "run").glob("stages/answers-*/answers.jsonl"))
    result = files.study(tmp_path / "run", "benchmark", **few(files))
    assert before > 0
    made, found = result.counters["answers"]
    assert made + found == whole.counters["answers"][0]
    assert found == before
    assert lasting(result) == lasting(whole)


class Flaky(Judge):
    """A judge of harm that dies after some rows, as one behind an endpoint may."""

    kind: ClassVar[str] = "flaky"
    gives: ClassVar[tuple[str, ...]] = ("harmful",)
    costly: ClassVar[bool] = True
    identity: ClassVar[dict[str, Any]] = {"kind": "flaky"}  # pyright: ignore[reportIncompatibleMethodOverride]
    lasts: ClassVar[int] = 10_000
    read: ClassVar[list[tuple[str, str]]] = []

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        found: list[Verdict] = []
        for answer in answers:
            if len(self.read) >= self.lasts:
                raise JudgeStopped("the endpoint is gone; start it and run again", verdicts=found)
            self.read.append((answer.prompt.text, answer.text))
            found.append(Verdict(outcome=None, judge=self.name, harmful="sorry" not in answer.text.lower()))
        return found


def test_a_failing_judge_never_becomes_a_score_and_a_rerun_completes_it(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    JUDGES.register("flaky", Flaky)
    asked = few(files, harm_judges=("flaky",))
    monkeypatch.setattr(Flaky, "lasts", 4)
    result = files.study(tmp_path / "run", "benchmark", **asked)
    rows = [row for row in result.effects if row.prompts == "harmful"]
    assert sum(row.attack["flaky"].unscored for row in rows) > 0
    assert [row.attack["flaky"].n + row.attack["flaky"].unscored for row in rows] == [6 * row.sets for row in rows]
    assert any("the endpoint is gone" in each and "run the same command again" in each for each in result.warnings)
    first = list(Flaky.read)
    assert len(first) == 4
    monkeypatch.setattr(Flaky, "lasts", 10_000)
    monkeypatch.setattr(Flaky, "read", [])
    done = files.study(tmp_path / "run", "benchmark", **asked)
    assert all(row.attack["flaky"].unscored == 0 for row in done.effects if row.prompts == "harmful")
    assert not [warning for warning in done.warnings if "flaky" in warning]
    # Equal pairs of prompt and answer are read once, and none of the first four again.
    assert not set(first) & set(Flaky.read)
    assert len(Flaky.read) == len(set(Flaky.read))
    assert {row.measure for row in done.comparisons} == {"compliance", "flaky"}


class Costly(Judge):
    """The patterns' verdicts, one by one, as a judge behind an endpoint gives them; dies after `lasts` rows."""

    kind: ClassVar[str] = "costly"
    costly: ClassVar[bool] = True
    identity: ClassVar[dict[str, Any]] = {"kind": "costly"}  # pyright: ignore[reportIncompatibleMethodOverride]
    lasts: ClassVar[int] = 10_000
    asked: ClassVar[list[tuple[str, str]]] = []

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        return [reading.verdict for reading in self.stream(answers)]

    def stream(self, answers: Sequence[Answer]) -> Iterator[Reading]:
        for row, verdict in enumerate(PatternJudge().judge(answers)):
            if len(self.asked) >= self.lasts:
                raise JudgeStopped("no credit is left")
            self.asked.append((answers[row].prompt.text, answers[row].text))
            yield Reading(row, verdict.model_copy(update={"judge": self.name}), True)


def test_an_answer_is_paid_for_once_and_a_failure_is_asked_again(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    JUDGES.register("costly", Costly)
    monkeypatch.setattr(Costly, "asked", [])
    whole = files.study(tmp_path / "whole", **files.small(judge="costly"))
    asked = len(Costly.asked)
    assert asked == len(set(Costly.asked)) > 0
    again = files.study(tmp_path / "whole", **files.small(judge="costly"))
    assert len(Costly.asked) == asked
    assert lasting(again) == lasting(whole)
    monkeypatch.setattr(Costly, "asked", [])
    monkeypatch.setattr(Costly, "lasts", asked - 1)
    broken = files.study(tmp_path / "run", **files.small(judge="costly"))
    assert any("failed on" in warning and "no credit is left" in warning for warning in broken.warnings)
    assert sum(row.refusal.unscored for row in broken.effects) > 0
    monkeypatch.setattr(Costly, "lasts", 10_000)
    done = files.study(tmp_path / "run", **files.small(judge="costly"))
    assert len(Costly.asked) == asked
    assert lasting(done) == lasting(whole)


def test_a_judge_given_twice_is_refused(files: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give each once"):
        files.study(tmp_path / "run", "benchmark", **few(files, harm_judges=("harmbench", "harmbench")))


@pytest.mark.parametrize("pool", ["attribution", "union"])
def test_pools_by_attribution_find_the_causal_features_too(files: Any, tmp_path: Path, pool: str) -> None:
    result = files.study(tmp_path / "run", pool=pool, n_exact=0)
    assert {row.feature for row in result.features} == files.truth.truth.causal
    assert result.pool_size == 10 * 4 if pool == "attribution" else result.pool_size > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": "nowhere.txt"}, "nowhere.txt"),
        ({"over_refusal": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"harm_judges": ("nobody",)}, "nobody"),
        ({"methods": ("nothing",)}, "nothing"),
    ],
)
def test_what_is_named_wrongly_is_found_before_anything_is_computed(
    files: Any, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    stages: list[str] = []
    with pytest.raises(InputError, match=words):
        files.study(tmp_path / "run", "benchmark", lambda stage, *_: stages.append(stage), **changes)
    assert set(stages) <= {"loading"}


def test_every_text_source_has_its_share(files: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} text {n}" for n in range(9)), encoding="utf-8")
    sources = [str(tmp_path / f"{name}.txt") for name in ("a", "b")]
    result = files.study(tmp_path / "run", "benchmark", **few(files, text=sources, n_text=5))
    measured = effect(result, "harmful", "suppress", "cossim+ap").side_effects
    assert measured is not None
    assert measured.ce_text is not None
    assert measured.ce_text.n == 5


def test_a_small_pool_limits_every_set_and_says_so(files: Any, tmp_path: Path) -> None:
    result = files.study(tmp_path / "run", "benchmark", **few(files, k0=1, k=11))
    assert result.k == result.pool_size == 4
    assert all(len(each) == 4 for each in result.sets.values())
    assert any("has that size instead of 11" in warning for warning in result.warnings)


@pytest.mark.eval
def test_capability_is_measured_under_each_method_and_once(files: Any, tmp_path: Path) -> None:
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
    result = files.study(tmp_path / "run", "benchmark", **asked)
    measured = {each.method: each.capability for each in result.extras}
    assert set(measured) == {"none", "cossim+ap", "cossim", "random"}
    # Several random sets have no one capability.
    assert measured.pop("random") == ()
    for method, (row, *_) in measured.items():
        assert (row.task, row.metric, row.n) == ("pick", "acc", 2)
        assert (row.intervention == "none") == (method == "none")
    assert len({row.digest for rows in measured.values() for row in rows}) == 1
    again = files.study(tmp_path / "run", "benchmark", **asked)
    assert lasting(again) == lasting(result)
    assert again.counters["capability"][0] == 0
    # Other questions in the task's data are other questions.
    documents[0]["gold"] = 1
    (tmp_path / "pick.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    assert files.study(tmp_path / "run", "benchmark", **asked).counters["capability"][0] > 0


def test_a_subspace_of_one_dimension_is_the_direction_and_more_take_out_more(files: Any, tmp_path: Path) -> None:
    methods = ("direction", "subspace", "subspace-clusters")
    result = files.study(
        tmp_path / "run",
        "benchmark",
        **few(files, methods=methods, dimensions="1,2", direction_form="linear", sizes=""),
    )
    rows = {(row.method, row.strength): row for row in result.effects if row.prompts == "harmful"}
    direction, one = rows["direction", 1.0], rows["subspace-clusters", 1.0]
    assert one.side_effects is not None
    assert direction.side_effects is not None
    assert one.outcomes == direction.outcomes
    assert one.side_effects.ce_answers.value == pytest.approx(direction.side_effects.ce_answers.value, abs=1e-4)
    for method in methods[1:]:
        assert rows[method, 2.0].setting == "2 dimensions"
        assert sum(row.chosen for row in rows.values() if row.method == method) == 1
        assert not [row for row in result.effects if row.method == method and row.kind == "induce"]
