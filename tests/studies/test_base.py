"""What every result and every study has: tables as data frames, charts by title, a page, and reading from a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from scripted import NoSaes, about

from demur.errors import DemurError, InputError, RunError
from demur.report.blocks import Chart, Section, Text
from demur.runs import Run, as_toml, read_run
from demur.stats import Estimate
from demur.studies import STUDIES
from demur.studies.base import Study, StudyResult, data_frame, page_of, read_results, unfinished
from demur.studies.config import StudyConfig
from demur.types import FeatureId, Value

pytest.importorskip("pandas")


class Inner(Value):
    rate: Estimate
    name: str = "x"


class Row(Value):
    n: int
    inner: Inner
    rate: Estimate | None = None
    where: tuple[int, ...] = ()


class Shown(StudyResult):
    numbers: tuple[int, ...] = (1, 2)
    none: tuple[Row, ...] = ()
    first: tuple[Row, ...] = ()
    effects: tuple[Row, ...] = ()
    mixed: tuple[Row | int, ...] = ()


A = Row(n=1, inner=Inner(rate=about(0.5, 0.1)), rate=about(0.25, 0.05), where=(3,))
B = Row(n=2, inner=Inner(rate=about(0.7, 0.1), name="y"))


def sections(result: Any) -> list[Section]:
    charts = [Chart(title, lambda title=title: f"drawn {title}") for title in ("One", "Two")[: len(result.numbers)]]
    return [Section("Words", (Text("first", "verdict"),)), Section("Charts", tuple(charts))]


def shown_study(name: str = "shown", **given: Any) -> Study[Any, Any]:
    made = Study(name, StudyConfig, Shown, lambda _: Shown(), sections, **given)
    return STUDIES.register(name, made)


# -- tables and charts -------------------------------------------------------------------------------------------------


def test_a_table_has_a_column_for_each_field_and_four_for_an_estimate() -> None:
    frame = Shown(first=(A, B)).to_frame("first")
    assert list(frame.columns) == [
        "n", "inner_rate", "inner_rate_low", "inner_rate_high", "inner_rate_n", "inner_name", "rate", "rate_low",
        "rate_high", "rate_n", "where",
    ]  # fmt: skip
    first, second = frame.to_dict("records")
    assert (first["n"], first["inner_name"], first["where"], second["inner_name"]) == (1, "x", (3,), "y")
    assert [first[f"rate{part}"] for part in ("", "_low", "_high", "_n")] == pytest.approx([0.25, 0.2, 0.3, 10])
    assert [first[f"inner_rate{part}"] for part in ("", "_low", "_high")] == pytest.approx([0.5, 0.4, 0.6])
    assert frame["rate"].isna().tolist() == [False, True]


def test_the_table_of_effects_comes_first_else_the_first_field_of_rows() -> None:
    assert Shown(first=(A,), effects=(B,)).to_frame()["n"].tolist() == [2]
    assert Shown(first=(A,)).to_frame()["n"].tolist() == [1]
    with pytest.raises(InputError, match=r"no table 'numbers'; there are first, effects$"):
        Shown(first=(A,), effects=(B,), mixed=(A, 3)).to_frame("numbers")
    with pytest.raises(InputError, match=r"no table ''; there are none$"):
        Shown().to_frame()
    assert data_frame([{"a": 1}, {"a": 2}])["a"].tolist() == [1, 2]


def test_without_pandas_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DemurError, match="pip install pandas"):
        Shown(first=(A,)).to_frame()


def test_charts_are_drawn_by_title(tmp_path: Path) -> None:
    shown_study()
    result = Shown(study="shown", model="org/chat")
    assert (result.chart(), result.chart("Two")) == ("drawn One", "drawn Two")
    with pytest.raises(InputError, match=r"no chart 'Three'; there are 'One', 'Two'$"):
        result.chart("Three")
    with pytest.raises(InputError, match=r"no chart None; there are none$"):
        Shown(study="shown", numbers=()).chart()
    written = Shown(study="shown", numbers=()).save_report(tmp_path / "page.md")
    assert written == tmp_path / "page.md"
    assert "first" in written.read_text(encoding="utf-8")
    assert "first" in Shown(study="shown", numbers=())._repr_html_()  # pyright: ignore[reportPrivateUsage]


# -- studies -----------------------------------------------------------------------------------------------------------


def test_transcoders_are_refused_where_the_residual_is_needed() -> None:
    shown_study().check(Reading({}))
    shown_study().check(Reading({0: "mlp_in"}))
    needs = shown_study(residual="it splices them")
    needs.check(Reading({}))
    with pytest.raises(InputError, match=r"`demur shown` needs SAEs .*: it splices them\. \./t holds transcoders"):
        needs.check(Reading({0: "mlp_in"}))


class Reading(NoSaes):
    """A suite that reads there."""

    reads: Any = None
    source: Any = "./t"

    def __init__(self, reads: Any) -> None:
        super().__init__()
        self.reads = reads


def test_a_page_holds_the_doubts_last_and_what_it_takes_to_run_again(tmp_path: Path) -> None:
    study = shown_study()
    with Run.open(tmp_path, config={"k": 3}, command="shown"):
        pass
    session = read_run(tmp_path).manifest.latest
    result = Shown(study="shown", model="org/chat", facts={"judge": "x"}, warnings=("a", "b"), seconds={"one": 1.26})
    page = page_of(study, result, session)
    assert [section.title for section in page.sections] == ["Words", "Charts", "Doubts"]
    doubts = page.sections[-1]
    assert (doubts.blocks, doubts.brief) == ((Text("a", "warning"), Text("b", "warning")), True)
    versions = ", ".join(f"{name} {version}" for name, version in session.versions.items())
    assert dict(page.facts) == {
        "judge": "x", "started": session.started, "versions": versions, "platform": session.platform,
        "seconds": "one 1.3",
    }  # fmt: skip
    assert (page.command, page.config) == ("demur shown --config shown.toml", as_toml(session.config))
    assert page.title.startswith("demur shown: ")
    bare = page_of(study, Shown(study="shown"))
    assert ([section.title for section in bare.sections], bare.facts, bare.config) == (["Words", "Charts"], (), "")


def test_results_are_read_with_their_sessions(tmp_path: Path) -> None:
    shown_study()
    shown_study("other")
    with pytest.raises(RunError, match="no run folder"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"is not a run folder"):
        read_results(tmp_path)
    assert unfinished(tmp_path) == ()
    result = Shown(study="shown", first=(A,))
    for command in ("shown", "other", "forgotten"):
        with Run.open(tmp_path / "run", config={}, command=command) as run:
            if command == "shown":
                run.save_result("shown.json", result.model_dump_json())
    ((study, found, session),) = read_results(tmp_path / "run")
    assert (study.name, study.file, found) == ("shown", "shown.json", result)
    assert session is not None
    assert session.command == "shown"
    assert unfinished(tmp_path / "run") == ("other",)
    # A result that was carried here without its manifest.
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "shown.json").write_text(result.model_dump_json())
    ((_, found, session),) = read_results(tmp_path / "alone")
    assert (found, session) == (result, None)
    with Run.open(tmp_path / "begun", config={}, command="other"):
        pass
    with pytest.raises(RunError, match=r"begun has not finished; run the same `demur other` command again"):
        read_results(tmp_path / "begun")


@pytest.mark.parametrize(
    ("text", "told"), [('{"first": [{"n": "x"}]}', r"first\.0\.n: "), ("{", "the file: "), ('{"zzz": 1}', "zzz: Extra")]
)
def test_a_result_of_another_version_is_named_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    shown_study()
    (tmp_path / "shown.json").write_text(text)
    with pytest.raises(RunError, match=rf"shown\.json does not hold the results of `demur shown` .*\({told}"):
        read_results(tmp_path)


def test_a_feature_stays_a_pair_in_a_table() -> None:
    class Of(Value):
        feature: tuple[int, int]

    class Result(StudyResult):
        rows: tuple[Of, ...] = (Of(feature=FeatureId(1, 2)),)

    assert Result().to_frame()["feature"].tolist() == [(1, 2)]
