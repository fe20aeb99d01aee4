"""The benchmark's part of the page, alone and beside a features study, and how it is read from a run folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_page import Page, parse

from demur.errors import RunError
from demur.report import read_benchmark, read_result, read_results, render, unfinished, write_report
from demur.report._benchmark_charts import STYLES, induction, pareto, sizes_damage, tradeoff
from demur.studies.benchmark.config import LOCAL, METHODS
from demur.studies.results import FeaturesResult
from synthetic_benchmark import (
    BENCHMARK_SESSION,
    JUDGE,
    comparison,
    emptied,
    synthetic_benchmark,
    with_comparisons,
    write_run,
)
from synthetic_results import HARMFUL_ANSWER, SESSION


def squeezed(parts: list[str]) -> str:
    return "".join("".join(parts).split())


def check_safe(html: str) -> Page:
    """Well formed, no script, nothing loaded, unique ids, links that lead somewhere, and the policy in place."""
    page = parse(html)
    assert "script" not in page.tags
    assert page.loads == []
    assert "url(http" not in html
    assert "@import" not in html
    assert len(page.ids) == len(set(page.ids))
    assert all(target.startswith("#") and target[1:] in page.ids for target in page.targets)
    assert "default-src 'none'; style-src 'unsafe-inline'" in html
    return page


def test_the_page_of_a_benchmark_is_well_formed_and_loads_nothing() -> None:
    page = check_safe(render(benchmark=synthetic_benchmark(), benchmark_session=BENCHMARK_SESSION))
    # No section of the features study, and no link to one.
    assert not {"effects", "direction", "samples", "setup"} & set(page.ids)
    assert {"compared", "suppression", "comparisons", "induction", "sizes", "side-effects", "search"} <= set(page.ids)


def test_the_page_shows_the_numbers_of_every_table() -> None:
    page = parse(render(benchmark=synthetic_benchmark(), benchmark_session=BENCHMARK_SESSION))
    text = squeezed(page.visible)
    for expected in (
        "Ways to suppress refusal in example/synthetic-7-layer-it, compared",
        "More harmful test prompts were complied with under F* (CosSim+AP) than under AP and random features",
        "K* = 4 of a pool of 70 (K0 = 10 a layer, by cosine), ranked by attribution (gradient)",
        # Refused, complied, attack success with three unscored, incoherent, n, damage on answers, text, KL.
        "F* (CosSim+AP) c = −3 8% [0–16] 90% [82–98] 80% 72–88 (+3) 2% 100 0.090 0.085–0.095 0.180 0.175–0.185 "
        "0.270 0.265–0.275",
        "F* per prompt c = −3 6% [0–14] 92% [84–100] 82% 74–90 (+3) 2% 100 – – –",
        "random features c = −3, 5 sets 94%",
        "Damage up to 0.02 nats per token: complied with (outcome judge)",
        # Strengths, F*, other, difference, damage, p, adjusted p, finding.
        "AP c = −3 / c = −3 90% 82–98 50% 42–58 +40 [30 to 50] 0.090 / 0.090 <0.001 <0.001 F* more",
        "affine direction c = −3 / whole 90% 82–98 50% 42–58 −20 [−30 to −10] 0.090 / 0.010 0.010 0.020 F* fewer",
        "ActDiff c = −1 / – 90% 82–98 – – 0.010 / – – – –",
        f"Each method at its own best strength: attack success ({JUDGE})",
        # The curve: size, strength, refused, complied, damage.
        "4 c = −3 60% [52–68] 36% [28–44] 0.0400 0.0375–0.0425",
        # Side effects: unchanged, refused, over-refusal and unchanged there, AUROC, says harmful of both.
        "AP c = −3 80% [72–88] 1% 0–9 10% 2–18 75% 67–83 0.88 0.81–0.94 93% 85–100 6% 0–14",
        "clean – 1% 0–9 28% 20–36 – 0.88",
        "all (several tasks together)",
        "F* (CosSim+AP) c = −3 acc 0.500 0.250 −0.250 [−0.740 to 0.240] 4 0",
        "F* (CosSim+AP) c = −3 acc 0.500 – −0.100 40 5",
        "trial 1: direction of layer 4, position −2, K0 = 10, K* = 5, c = −3, with 90% of the harmful tuning prompts "
        "complied with at a damage of 0.0500 nats per token",
        "answers: 1,234 written, 5 found; verdicts: 6 given, 0 found; passes: 7 made, 8 found",
        "demur benchmark --config benchmark.toml",
        "1 h 01 min",
    ):
        assert squeezed([expected]) in text, expected


def test_every_strength_is_in_a_collapsed_table() -> None:
    page = parse(render(benchmark=synthetic_benchmark()))
    hidden = squeezed(page.collapsed)
    assert squeezed(["AP c = −1 68% [60–76] 30% [22–38]"]) in hidden
    assert squeezed(["AP c = −1 68%"]) not in squeezed(page.visible)
    assert squeezed(["ActDiff 1 × peak 58% [50–66] 40% [32–48] 2% 100"]) in hidden
    assert squeezed(["3 4 −2 10 7 −3 – – no"]) in hidden
    assert squeezed(["ActDiff 4 0 2 in 2, 2 in 3 2:50, 3:51, 2:52, 3:53"]) in hidden


def test_harmful_prompts_and_answers_are_collapsed_behind_the_notice() -> None:
    page = parse(render(benchmark=synthetic_benchmark()))
    visible, collapsed = "".join(page.visible), "".join(page.collapsed)
    assert HARMFUL_ANSWER.format(number=1) in collapsed
    assert HARMFUL_ANSWER.format(number=1) not in visible
    assert "Synthetic harmful prompt" in collapsed
    assert "Synthetic harmful prompt" not in visible
    assert "Harmful prompts and what the model answered: click to read." in visible
    assert "F* (CosSim+AP), c = −3 · compliance" in collapsed
    assert "random features, c = −3 · unscored" in collapsed


def test_harmless_samples_stay_open() -> None:
    result = synthetic_benchmark()
    samples = tuple(
        each.model_copy(update={"label": "harmless", "prompt": "How do I cook?"}) for each in result.samples
    )
    page = parse(render(benchmark=result.model_copy(update={"samples": samples})))
    assert "How do I cook?" in "".join(page.visible)


def test_prompts_answers_judges_and_settings_cannot_inject_markup() -> None:
    session = BENCHMARK_SESSION.model_copy(update={"config": {"methods": [], "model": "<img src=x onerror=y>"}})
    html = render(benchmark=synthetic_benchmark(), benchmark_session=session)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert "<b>judge" not in html
    assert "harm &lt;b&gt;judge&lt;/b&gt;" in html
    assert "<i>with</i>" not in html
    assert "<img" not in html
    assert "of &lt;file&gt; were dropped" in html


def test_each_chart_is_drawn_with_colours_of_the_page_and_a_mark_for_each_method() -> None:
    html = render(benchmark=synthetic_benchmark())
    # Two measures of suppression, induction, refusal and damage by size, the search.
    assert html.count("<figure") == html.count("</figure>") == 6
    drawing = tradeoff(synthetic_benchmark(), "compliance", "t")
    assert drawing is not None
    for style in STYLES.values():
        assert f'fill="{style.colour}"' in drawing
    # One mark for each method and strength with a damage: six sets at two strengths, two directions at one, and a
    # ring around each of the eight that were chosen.
    filled = re.findall(r'<path[^>]*d="M[^"]*"[^>]*fill="var\(--b-[a-z-]+\)"', drawing)
    assert len(filled) == 6 * 2 + 2
    rings = re.findall(r'<path[^>]*stroke-width="1\.6"', drawing)
    assert len(rings) == 8
    assert len({style.mark for style in STYLES.values()}) == len(STYLES)
    assert len({style.dash for style in STYLES.values()}) == len(STYLES)
    assert set(STYLES) == set(METHODS) - set(LOCAL)


def test_damage_of_all_sizes_fits_on_one_axis() -> None:
    result = synthetic_benchmark()
    far = tuple(
        row.model_copy(
            update={
                "damage": row.damage.model_copy(
                    update={"answers": row.damage.answers.model_copy(update={"value": 40.0 if row.chosen else -0.5})}
                )
            }
        )
        if row.damage
        else row
        for row in result.suppression
    )
    drawing = tradeoff(result.model_copy(update={"suppression": far}), "compliance", "t")
    assert drawing is not None
    labels = re.findall(r">([−\d.]+)</text>", drawing)
    assert {"0", "20"} <= set(labels)


def test_directions_are_left_out_of_an_induction_axis_of_values() -> None:
    result = synthetic_benchmark()
    colour = f'"{STYLES["direction"].colour}"'
    multiples, values = induction(result), induction(result.model_copy(update={"strength_unit": "value"}))
    assert multiples is not None
    assert values is not None
    assert colour in multiples
    assert colour not in values


def test_nothing_scored_is_shown_as_dashes_and_draws_nothing() -> None:
    result = emptied()
    html = render(benchmark=result, benchmark_session=BENCHMARK_SESSION)
    check_safe(html)
    assert not re.search(r"\b(nan|inf|none)\b", squeezed(parse(html).visible).lower())
    assert "<figure" not in html
    assert tradeoff(result, "compliance", "t") is None
    assert induction(result) is None
    assert sizes_damage(result) is None
    assert pareto(result) is None
    assert "No other method could be compared with F* (CosSim+AP)." in html


def test_a_result_with_almost_nothing_in_it_still_renders() -> None:
    bare = synthetic_benchmark().model_copy(
        update={
            "judges": (),
            "sets": {},
            "suppression": (),
            "induction": (),
            "side_effects": (),
            "comparisons": (),
            "curve": (),
            "tuning": None,
            "samples": (),
            "warnings": (),
            "seconds": {},
        }
    )
    page = check_safe(render(benchmark=bare))
    text = "".join(page.visible)
    assert "F* was compared with no other method." in text
    assert "No answers were kept." in text
    assert "Before you rely on this" not in text
    assert "figure" not in page.tags


def test_budgets_are_ticks_and_lines_of_the_trade_off() -> None:
    result = with_comparisons(comparison("ap", 0.3, 0.01, budget=0.033))
    drawing = tradeoff(result, "compliance", "t")
    assert drawing is not None
    assert ">0.033</text>" in drawing
    assert drawing.count('stroke="var(--faint)" stroke-dasharray="3,3"') == 1


def test_both_studies_share_a_page(result: FeaturesResult) -> None:
    html = render(result, SESSION, benchmark=synthetic_benchmark(), benchmark_session=BENCHMARK_SESSION)
    page = check_safe(html)
    text = "".join(page.visible)
    assert {"setup", "effects", "samples", "compared", "benchmark-answers", "use", "repeat"} <= set(page.ids)
    assert "cut refusal from 95%" in text
    assert "More harmful test prompts were complied with" in text
    # Both warn of the same prompts: once is enough.
    assert text.count("synthetic warning: 3 prompts of <file> were dropped") == 1
    assert "the judge <J> failed on 2 answers" in text
    assert "demur study --config study.toml" in squeezed_words(text)
    assert "demur benchmark --config benchmark.toml" in squeezed_words(text)
    assert "Versions of the benchmark" in text
    assert "Synthetic harmful prompt" not in text


def squeezed_words(text: str) -> str:
    return " ".join(text.split())


def test_a_page_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        render()


def test_write_report_uses_what_the_folder_holds(tmp_path: Path, result: FeaturesResult) -> None:
    benchmark = synthetic_benchmark()
    alone = write_run(tmp_path / "alone", benchmark=benchmark, sessions=(BENCHMARK_SESSION,))
    both = write_run(tmp_path / "both", features=result, benchmark=benchmark, sessions=(SESSION, BENCHMARK_SESSION))
    assert "What intervening does" not in write_report(alone).read_text()
    page = write_report(both).read_text()
    assert "What intervening does" in page
    assert "F* against each method, on the same prompts" in page
    # Each study is repeated from its own session, though the benchmark's is the latest.
    study, bench = page.split("<code>benchmark.toml</code>")
    assert "tune = 4" not in study
    assert "tune = 4" in bench


def test_a_features_study_is_repeated_from_its_own_session(tmp_path: Path, result: FeaturesResult) -> None:
    folder = write_run(tmp_path / "run", features=result, sessions=(SESSION, BENCHMARK_SESSION))
    page = write_report(folder).read_text()
    assert "k = 20" in page
    assert "tune = 4" not in page


def test_read_benchmark_round_trips(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", benchmark=emptied())
    # NaN equals nothing: compare what is written.
    assert read_benchmark(folder).model_dump_json() == emptied().model_dump_json()
    assert read_results(folder).features is None


def test_read_benchmark_tells_missing_unfinished_foreign_and_broken_folders_apart(
    tmp_path: Path, result: FeaturesResult
) -> None:
    with pytest.raises(RunError, match=r"no run folder .*nowhere.*`demur benchmark`"):
        read_benchmark(tmp_path / "nowhere")
    folder = write_run(tmp_path / "run", sessions=(BENCHMARK_SESSION,))
    with pytest.raises(RunError, match=r"has not finished.*same `demur benchmark` command"):
        read_benchmark(folder)
    (folder / "benchmark.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(RunError, match=r"benchmark\.json does not hold a benchmark's .*\(model: .*`demur benchmark`"):
        read_benchmark(folder)
    (folder / "benchmark.json").write_bytes(b'{"model"')
    with pytest.raises(RunError, match=r"does not hold .*\(the file: "):
        read_benchmark(folder)
    (folder / "benchmark.json").unlink()
    (folder / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"not a run folder: it holds neither benchmark\.json nor manifest\.json"):
        read_benchmark(folder)
    write_run(folder, features=result)
    with pytest.raises(
        RunError,
        match=r"results of a features study \(results\.json\) but none of a benchmark; .*`demur benchmark --out",
    ):
        read_benchmark(folder)


def test_read_result_names_a_folder_that_holds_a_benchmark_only(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", benchmark=synthetic_benchmark())
    with pytest.raises(RunError, match=r"results of a benchmark \(benchmark\.json\) but none of a features study"):
        read_result(folder)


def test_a_folder_with_neither_result_is_unfinished_or_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a run folder: it holds none of results\.json, benchmark\.json and man"):
        write_report(write_run(tmp_path / "empty"))
    begun = write_run(tmp_path / "begun", sessions=(SESSION, BENCHMARK_SESSION))
    with pytest.raises(RunError, match=r"not finished; run the same `demur study` or `demur benchmark` command again"):
        write_report(begun)
    with pytest.raises(RunError, match=r"no run folder"):
        write_report(tmp_path / "nowhere")


def test_unfinished_names_the_commands_that_left_no_results(tmp_path: Path, result: FeaturesResult) -> None:
    folder = write_run(tmp_path / "run", sessions=(SESSION, BENCHMARK_SESSION))
    assert unfinished(folder) == ("demur study", "demur benchmark")
    write_run(folder, features=result)
    assert unfinished(folder) == ("demur benchmark",)
    write_run(folder, benchmark=synthetic_benchmark())
    assert unfinished(folder) == unfinished(tmp_path) == ()
