"""The page: valid, self-contained, escaped, and with nothing harmful in sight before a click."""

from __future__ import annotations

import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from demur.errors import RunError
from demur.report import duration, read_result, render, write_report
from demur.report._charts import curve, layer_colours
from demur.report._features_part import candidate_maps
from demur.runs import as_toml
from demur.studies.results import FeaturesResult
from synthetic_results import HARMFUL_ANSWER, SESSION, effect

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks nesting; collects visible and collapsed text, ids, links, and what would load."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.visible: list[str] = []
        self.collapsed: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                self.targets.append(value or "")
            if name in {"src", "srcset", "data", "action"} or name.startswith("on"):
                self.loads.append(f"{tag} {name}={value}")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack[-1] == tag, f"</{tag}> closes <{self.stack[-1]}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.stack):
            hidden = "details" in self.stack and "summary" not in self.stack
            (self.collapsed if hidden else self.visible).append(data)


def parse(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.stack == []
    return page


def test_page_is_well_formed_and_loads_nothing(result: FeaturesResult) -> None:
    html = render(result, SESSION)
    page = parse(html)
    assert html.startswith("<!doctype html>")
    assert "script" not in page.tags
    assert page.loads == []
    assert "url(http" not in html
    assert "@import" not in html
    assert len(page.ids) == len(set(page.ids))
    assert all(target.startswith("#") and target[1:] in page.ids for target in page.targets)


def test_harmful_prompts_and_answers_are_collapsed_and_harmless_ones_open(result: FeaturesResult) -> None:
    page = parse(render(result))
    visible, collapsed = "".join(page.visible), "".join(page.collapsed)
    assert HARMFUL_ANSWER.format(number=1) in collapsed
    assert HARMFUL_ANSWER.format(number=1) not in visible
    assert "Synthetic harmful prompt" in collapsed
    assert "Synthetic harmful prompt" not in visible
    assert "How do I cook soup number 1?" in visible
    assert "features F*, set (2 × peak) · unscored" in visible
    assert "features F*, scaled (c = −3) · compliance" in collapsed


def test_prompts_answers_tokens_and_settings_cannot_inject_markup(result: FeaturesResult) -> None:
    html = render(result, SESSION)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert "<b>soup</b>" not in html
    assert "&lt;Sorry&gt;" in html
    assert "a &lt;b&gt;.csv" in html
    assert "of &lt;file&gt; were dropped" in html


def test_page_shows_the_numbers_of_every_table(result: FeaturesResult) -> None:
    text = "".join("".join(parse(render(result)).visible).split())
    # Headline, facts, splits, feature row 1 with its exact value, estimators, direction, stages.
    for expected in (
        "cut refusal from 95% [87–100] to 10% [2–18]",
        "1,234,567 parameters, 7 layers of width 256",
        "4,096 features a layer, jumprelu, average L0 near 20; 7 layers, 0 to 6",
        "direction 128 124 128 127",
        "F* holds 20 of the 70 features in the pool (5 in layer 2, 5 in layer 3, 5 in layer 4, 5 in layer 5)",
        "A prompt’s own set holds 75% of them on average",
        # The last three: p against the baseline, p against random features, unchanged.
        "features F*, scaled c = −3 10% [2–18] 88% [80–96] 0 2 100 <0.001 0.004 3%",
        "features F*, set 2 × peak 90% [82–98] 8% [0–16] 0 2 100 <0.001 0.007 –",
        "random features, set 2 × peak 6% [0–14] 92% [84–100] 0 2 100 1.00 – –",
        "3:1111 2.000 2.200 0.500 20% 2% 30.00",
        "Chosen: layer 4, position −2 (<end_of_turn>), linear form, norm 12.50",
        "1 h 01 min",
    ):
        assert expected.replace(" ", "") in text, expected


def test_two_charts_and_the_bars_are_drawn_with_colours_of_the_page(result: FeaturesResult) -> None:
    html = render(result)
    assert html.count("<figure") == 3
    assert 'stroke="var(--m-features)"' in html
    assert 'stroke="var(--m-random)"' in html
    assert 'stroke="var(--m-direction)"' in html
    # One bar a feature, in its layer's colour: layers 2 to 5 hold five each.
    for colour in layer_colours([2, 3, 4, 5]).values():
        assert html.count(f'fill="{colour}"') == 5


def test_strengths_are_written_with_all_their_digits(result: FeaturesResult) -> None:
    effects = tuple(
        effect("harmful", "suppress", "features", strength, 50, chosen=strength == 0.25)
        for strength in (0.25, -0.125, -1.0)
    )
    drawing = curve(result.model_copy(update={"effects": effects}), "harmful", "suppress")
    assert drawing is not None
    assert {">0.25</text>", ">−0.125</text>", ">−1</text>"} <= set(re.findall(r">[^<>]+</text>", drawing))


def test_layer_colours_follow_depth_from_one_end_to_the_other() -> None:
    assert layer_colours([9, 3, 3, 5]) == {3: "#5e4b9c", 5: "#2a958c", 9: "#d3a029"}
    assert layer_colours([7]) == {7: "#5e4b9c"}


def test_candidate_maps_grade_the_kept_ones_from_worst_to_best(result: FeaturesResult) -> None:
    (grid,) = candidate_maps(result)
    cells = {(cell.row.layer, cell.row.position): cell for _, row in grid.rows for cell in row if cell}
    # Kept are layers 2 to 4; bypass is 6 − 1.5 layer + 0.5 |position + 2|: worst 4.0, best 0.0.
    assert grid.positions == (-4, -3, -2, -1)
    assert cells[2, -4].heat == 0.0
    assert cells[4, -2].heat == 1.0
    assert cells[3, -3].heat == 0.5
    assert cells[6, -2].heat == 0.0
    assert [key for key, cell in cells.items() if cell.chosen] == [(4, -2)]


def test_a_result_with_almost_nothing_in_it_still_renders(result: FeaturesResult) -> None:
    bare = result.model_copy(
        update={
            "features": (),
            "features_by_layer": {},
            "estimators": (),
            "effects": (),
            "samples": (),
            "warnings": (),
            "refusal_tokens": (),
            "seconds": {},
            "local_overlap": float("nan"),
        }
    )
    page = parse(render(bare))
    text = "".join(page.visible)
    assert "No chosen intervention was measured" in text
    assert "No answers were kept." in text
    assert "Before you rely on this" not in text
    assert "figure" not in page.tags


def test_unscored_answers_and_empty_rates_are_shown_as_such(result: FeaturesResult) -> None:
    row = effect("harmful", "suppress", "features", -3.0, 10, chosen=True)
    unscored = row.model_copy(
        update={
            "refusal": row.refusal.model_copy(update={"k": 0, "n": 0, "unscored": 100, "low": 0.0, "high": 1.0}),
            "unscored": 100,
        }
    )
    html = render(result.model_copy(update={"effects": (unscored,)}))
    assert "(+100)" in html
    assert "nan" not in html.lower().replace("dominant", "")


def test_write_report_goes_to_the_run_folder_or_where_told(run_folder: Path, tmp_path: Path) -> None:
    assert write_report(run_folder) == run_folder / "report.html"
    assert (
        write_report(run_folder, tmp_path / "deep" / "page.html").read_bytes()
        == (run_folder / "report.html").read_bytes()
    )
    assert write_report(run_folder, tmp_path) == tmp_path / "report.html"
    assert sorted(path.name for path in run_folder.iterdir()) == [
        "manifest.json",
        "report.html",
        "results.json",
    ]


def test_write_report_names_a_place_that_cannot_be_written(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write the report to .*file/page\.html.*--out"):
        write_report(run_folder, tmp_path / "file" / "page.html")


def test_read_result_round_trips(run_folder: Path, result: FeaturesResult) -> None:
    # The synthetic gaps hold NaN, which equals nothing: compare what is written.
    assert read_result(run_folder).model_dump_json() == result.model_dump_json()


def test_read_result_tells_missing_unfinished_foreign_and_broken_folders_apart(run_folder: Path) -> None:
    with pytest.raises(RunError, match=r"no run folder .*nowhere"):
        read_result(run_folder / "nowhere")
    (run_folder / "results.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(RunError, match=r"results\.json does not hold .*\(model: "):
        read_result(run_folder)
    (run_folder / "results.json").write_bytes(b'{"model"')
    with pytest.raises(RunError, match=r"does not hold .*\(the file: "):
        read_result(run_folder)
    (run_folder / "results.json").unlink()
    with pytest.raises(RunError, match=r"has not finished.*same `demur study` command"):
        read_result(run_folder)
    (run_folder / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"not a run folder: it holds neither results\.json nor manifest\.json"):
        read_result(run_folder)


@pytest.mark.parametrize("content", ["[1]", "{", b"\xff"])
def test_a_broken_manifest_is_named(run_folder: Path, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    (run_folder / "manifest.json").write_bytes(data)
    with pytest.raises(RunError, match=r"manifest\.json"):
        write_report(run_folder)


def test_toml_of_a_configuration_reads_back_equal() -> None:
    config = {
        "model": 'quote " back\\slash \n line \x7f ünïcode',
        "n_test": 100,
        "flag": True,
        "suppress": [0.0, -1.0, 1e-05, 1e16],
        "harmful": [{"source": "a.csv", "column": "goal"}, {"source": "b.csv"}],
        "odd key": "x",
    }
    assert tomllib.loads(as_toml(config)) == config
    assert as_toml({"saes": None, "harmful": [{"source": "a", "column": None}]}) == 'harmful = [{ source = "a" }]\n'


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.54, "1.5 s"), (59.7, "1 min 00 s"), (12.4, "12 s"), (125, "2 min 05 s"), (3700, "1 h 01 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
