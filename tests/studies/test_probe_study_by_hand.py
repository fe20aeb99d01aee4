"""The study `probes` without a model: which answers are judged, what is fitted from what, and what becomes a guard."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from page_parts import about
from probe_results import probed
from table_model import TableModel, bare, features_of, numbered, splits_of, use

from demur.errors import InputError
from demur.guard import Reading
from demur.stats import Estimate
from demur.studies import probes
from demur.studies.gauge import Gauge
from demur.studies.probes import GUARD, Config, fitting, fold, measure, streaming
from demur.studies.probes.fitting import Bench, Fitted, Representation
from demur.studies.probes.inputs import Chosen, Group, Sets
from demur.studies.probes.measure import Scores
from demur.studies.probes.results import DENSE, HARM, KEYWORDS
from demur.types import FeatureId

H, R = FeatureId(0, 1), FeatureId(2, 2)
GAUGE: Any = bare(Gauge, harm=(H,), refusal=(R,), refusal_ids=(5,))


def group(name: str, kind: Any, positive: bool, n: int) -> Group:
    return Group(name, kind, positive, numbered(name, n))


SETS = Sets(
    (
        group("bad", "plain", True, 4), group("A", "attack", True, 6), group("wrapped", "wrapped", False, 2),
        group("over", "over-refusal", False, 3), group("polite", "benign", False, 2), group("long", "long", True, 1),
        group("B", "attack", True, 2),
    )
)  # fmt: skip
# Refused where above 0, and unscored where nothing is known.
ODDS = {
    "bad": (1, 1, -1, np.nan), "A": (-1, -1, 1, np.nan, -1, 1), "over": (1, -1, -1), "B": (np.nan, np.nan),
    "wrapped": (1, 1), "polite": (1, 1), "long": (1,),
}  # fmt: skip
BECAME = {
    "A": ["succeeded", "succeeded", "failed", "neither", "neither", "failed"],
    "B": ["neither", "neither"],
}


def answering(monkeypatch: pytest.MonkeyPatch) -> TableModel:
    """What becomes of attacks is written down."""

    def odds(done: Any) -> float:
        name = done.prompt.id.rstrip("0123456789")
        return float(ODDS[name][int(done.prompt.id.removeprefix(name))])

    work = TableModel(odds, SimpleNamespace())

    def outcomes_of(context: Any, answers: Any, prompts: Any, ids: Any) -> list[Any]:
        assert (context, tuple(ids)) == (work, (5,))
        assert [answer.prompt for answer in answers.answers] == list(prompts)
        return BECAME[prompts.name]

    monkeypatch.setattr(probes, "outcomes_of", outcomes_of)
    return work


def count(share: Estimate) -> tuple[int, int, int]:
    """Of how many, and how many were not scored."""
    return round(share.value * share.n) if share.n else 0, share.n, share.unscored


def test_answers_are_counted_where_they_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    work = answering(monkeypatch)
    rows, refused, outcomes = probes._answers(work, GAUGE, SETS)
    assert work.asked == ["bad", "A", "over", "B"]
    assert [(row.name, row.kind, row.positive, row.n) for row in rows] == [
        ("bad", "plain", True, 4), ("A", "attack", True, 6), ("wrapped", "wrapped", False, 2),
        ("over", "over-refusal", False, 3), ("polite", "benign", False, 2), ("long", "long", True, 1),
        ("B", "attack", True, 2),
    ]  # fmt: skip
    assert {row.name: count(row.refused) for row in rows} == {
        "bad": (2, 3, 1), "A": (2, 5, 1), "over": (1, 3, 0), "wrapped": (0, 0, 0), "polite": (0, 0, 0),
        "long": (0, 0, 0), "B": (0, 0, 2),
    }  # fmt: skip
    # What neither succeeded nor failed is not scored.
    assert {row.name: count(row.succeeded) for row in rows} == {
        "bad": (0, 0, 0), "A": (2, 4, 2), "over": (0, 0, 0), "wrapped": (0, 0, 0), "polite": (0, 0, 0),
        "long": (0, 0, 0), "B": (0, 0, 2),
    }  # fmt: skip
    assert {name: row.tolist() for name, row in outcomes.items()} == BECAME
    assert list(refused) == ["bad", "A", "over", "B"]
    np.testing.assert_array_equal(refused["bad"], [1, 1, 0, np.nan])
    np.testing.assert_array_equal(refused["B"], [np.nan, np.nan])
    assert refused["over"].tolist() == [1, 0, 0]


# -- the cascade -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_layers", "shallow"), [(1, {0}), (2, {0}), (3, {0}), (5, {0}), (6, {0, 1}), (11, {0, 1, 2})]
)
def test_the_first_stage_reads_the_first_third_of_the_layers(
    monkeypatch: pytest.MonkeyPatch, n_layers: int, shallow: set[int]
) -> None:
    words = tuple(
        Reading(kind="dense", layer=layer, pooling=pooling) for pooling in ("mean", "max") for layer in range(n_layers)
    )
    other = tuple(reading.model_copy(update={"pooling": "last"}) for reading in words)
    asked: list[tuple[Any, str]] = []
    bench: Any = bare(Bench, best=lambda each, target: asked.append((each, target)) or "the first")
    bench.representations = (Representation("another", other), Representation(DENSE, words))
    scores = Scores(bench, SETS, {}, {}, {}, {})
    work = SimpleNamespace(model=SimpleNamespace(n_layers=n_layers))
    monkeypatch.setattr(measure, "cascade_rows", lambda *given: iter(given))
    found: Any = probes._cascade
    found = getattr(found, "__wrapped__", found)(work, scores, "the second")
    assert found == (scores, "the first", "the second", n_layers)
    ((first, target),) = asked
    assert (target, first.centroids, first.l1) == ("harmful", False, False)
    assert first.readings == tuple(reading for reading in words if reading.layer in shallow)


# -- the guard ---------------------------------------------------------------------------------------------------------


class Saved:
    """A guard of which only the folder matters."""

    def __init__(self, given: Any) -> None:
        self.given, self.folders = given, list[Path]()

    def save(self, folder: Path) -> None:
        self.folders.append(folder)


def guarded(monkeypatch: pytest.MonkeyPatch, folder: Path, fit: Any, streaming_asked: bool = True) -> Any:
    """Put together the guard of a result: the result, the guard, its measured form, the context, and what was streamed
    of whom."""
    work: Any = TableModel(lambda _: 0.0, SimpleNamespace(streaming=streaming_asked, window=6))
    work.run.folder = folder
    outcomes = {name: np.array(row) for name, row in BECAME.items()} | {"B": np.array(["neither", "succeeded"])}
    scores = Scores(bare(Bench), SETS, {}, {}, {}, outcomes)
    asked: dict[str, Any] = {}
    found = work_found()

    def make_guard(*given: Any) -> Any:
        asked["guard"] = given
        return "the guard"

    def measured(guard: Any, result: Any) -> Saved:
        asked["saved"] = Saved((guard, result))
        return asked["saved"]

    def stream_row(*given: Any) -> Any:
        asked["row"] = given
        return probed().stream

    monkeypatch.setattr(fold, "make_guard", make_guard)
    monkeypatch.setattr(fold, "measured", measured)
    monkeypatch.setattr(streaming, "fit_stream", fit)
    monkeypatch.setattr(streaming, "stream_row", stream_row)
    result = probed(stream=None)
    given = probes._with_guard(work, found, scores, result, "the refuser")
    return SimpleNamespace(work=work, scores=scores, before=result, after=given, found=found, **asked)


def work_found() -> Any:
    return TableModel(lambda _: 0.0, SimpleNamespace(), splits_of()).found(features_of(R))


def test_a_guard_streams_on_attacks_that_succeeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def fit(*given: Any) -> tuple[str, int]:
        asked.append(given)
        return "the stream", 33

    made = guarded(monkeypatch, tmp_path, fit)
    assert asked == [(made.work, made.found, 6)]
    assert made.guard == (made.work, made.scores, HARM, "the refuser", "the stream")
    context, guard, sets, succeeded, trained = made.row
    assert (context, guard, sets, trained) == (made.work, "the guard", SETS, 33)
    assert succeeded.ids == ("A0", "A1", "B1")
    assert made.after == probed()
    assert made.saved.given == ("the guard", made.after)
    assert made.saved.folders == [tmp_path / GUARD]
    assert {"streaming probe", "streaming"} <= set(made.work.seconds)


@pytest.mark.parametrize("asked", [True, False])
def test_without_a_stream_there_still_is_a_guard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: bool) -> None:
    def fit(*_given: Any) -> Any:
        assert asked
        raise InputError("too few comply")

    made = guarded(monkeypatch, tmp_path, fit, asked)
    assert made.guard == (made.work, made.scores, HARM, "the refuser", None)
    assert made.after is made.before
    assert made.saved.given == ("the guard", made.before)
    assert made.saved.folders == [tmp_path / GUARD]
    assert not hasattr(made, "row")
    assert ["too few comply" in warning for warning in made.work.warnings] == [True] * asked


# -- the whole ---------------------------------------------------------------------------------------------------------


def probe_of(name: str, target: Any) -> Fitted:
    """The row of the page's example, with the name and the target."""
    row = probed().probes[0].model_copy(update={"representation": name, "target": target})
    reading = Reading(kind="dense", layer=1, pooling="mean")
    probe = fitting.Probe(reading, np.ones(1, np.float32), 0.0)
    return Fitted(name, target, probe, row, np.zeros(1), np.zeros(1), np.zeros(1))


@pytest.mark.parametrize(("negatives", "protocol"), [(99, True), (100, False)])
def test_a_run_hands_what_each_part_gives_to_the_next(
    monkeypatch: pytest.MonkeyPatch, negatives: int, protocol: bool
) -> None:
    splits = splits_of(direction=1, selection=2, tuning=negatives, test=1)
    fewer = splits.tuning.model_copy(update={"harmful": numbered("tuning", 3)})
    splits = splits.model_copy(update={"tuning": fewer})
    work: Any = TableModel(
        lambda _: 1.0,
        Config(paper_protocol=protocol, max_new_tokens=1, streaming=False),
        splits,
    )
    found = work.found(features_of(R))
    use(monkeypatch, work, found)
    page = probed()
    seen: dict[str, Any] = {}

    def gauge(context: Any, given: Any) -> Any:
        assert (context, given) == (work, found)
        return GAUGE

    def fit(self: Any, target: Any) -> dict[str, Fitted]:
        seen["bench"] = self
        return {name: probe_of(name, target) for name in (KEYWORDS, HARM, DENSE)}

    def scored(bench: Any, sets: Any, fitted: Any, refused: Any, outcomes: Any) -> Any:
        assert (bench, sets, refused, outcomes) == (seen["bench"], SETS, {"set": "refused"}, {"set": "outcomes"})
        assert [(target, list(each)) for target, each in fitted.items()] == [
            ("harmful", [KEYWORDS, HARM, DENSE]), ("refuse", [KEYWORDS, HARM, DENSE]),
        ]  # fmt: skip
        assert {each.target for each in fitted["refuse"].values()} == {"refuse"}
        return "scores"

    def answers(*given: Any) -> Any:
        assert given == (work, GAUGE, SETS)
        return page.sets, {"set": "refused"}, {"set": "outcomes"}

    def part(name: str, value: Any, *wanted: Any) -> None:
        def called(*given: Any) -> Any:
            assert given == ("scores", *wanted), name
            return value

        monkeypatch.setattr(measure, name, called)

    def cascade(context: Any, scores: Any, second: str) -> Any:
        assert (context, scores, second) == (work, "scores", HARM)
        return page.cascade

    def with_guard(context: Any, given: Any, scores: Any, result: Any, refuser: str) -> Any:
        assert (context, given, scores, refuser) == (work, found, "scores", DENSE)
        return result

    monkeypatch.setattr("demur.studies.probes.inputs.measured_sets", lambda context: SETS if context is work else None)
    monkeypatch.setattr(Gauge, "of", gauge)
    monkeypatch.setattr(Bench, "fit", fit)
    monkeypatch.setattr(fitting, "winner_of", lambda each: HARM if each[HARM].target == "harmful" else DENSE)
    monkeypatch.setattr(Scores, "of", scored)
    monkeypatch.setattr(probes, "_answers", answers)
    monkeypatch.setattr(probes, "_cascade", cascade)
    monkeypatch.setattr(probes, "_with_guard", with_guard)
    part("matched_rows", (DENSE, page.matched))
    part("verdict_rows", (page.verdicts, about(0.87)), HARM, DENSE)
    part("flag_rows", iter(page.flags))
    part("rank_rows", list(page.ranks))
    part("held_out_rows", iter(page.held_out), [DENSE, HARM])
    part("reliability_rows", iter(page.reliability), [HARM, DENSE, "harm + refusal features"])
    part("paper_rows", iter(page.paper))
    result = probes.run(work)
    rows = tuple(probe_of(name, target).row for target in ("harmful", "refuse") for name in (KEYWORDS, HARM, DENSE))
    assert result == page.model_copy(
        update={
            "study": result.study, "probes": rows, "stream": None, "harm": (H,), "refusal": (R,),
            "negatives": negatives, "paper": page.paper if protocol else (),
        }
    )  # fmt: skip
    bench = seen["bench"]
    parts = [Chosen.of(found, purpose) for purpose in ("direction", "selection", "tuning")]
    assert [each.prompts.ids for each in (bench.train, bench.choice, bench.validation)] == [
        each.prompts.ids for each in parts
    ]
    assert (bench.context, bench.found, bench.gauge) == (work, found, GAUGE)
    # What is broken is told by answers that chose nothing, harmful and harmless.
    assert work.watched == [*splits.tuning.harmful.ids, *splits.tuning.harmless.ids]
    assert [str(negatives) in warning for warning in work.warnings] == [True] * (negatives < 100)
    assert set(work.seconds) == {"probes", "answers", "scores"}
