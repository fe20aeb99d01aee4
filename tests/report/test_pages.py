"""A page with every block, in HTML, in Markdown, on a terminal and as a file."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape
from rich.cells import cell_len
from rich.console import Console
from synthetic_page import HARMFUL_ANSWER, HARMFUL_PROMPT, INJECTION, METHODS, effects, marked, page

from demur.errors import RunError
from demur.report import notebook_html, render_html, render_markdown, render_terminal, write_report
from demur.report.blocks import Column, Page, Section, Table, Text, Token, Tokens, Transcript, Transcripts

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Reader(HTMLParser):
    """Checks nesting; collects visible and collapsed text, ids, links, and what would load."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.visible: list[str] = []
        self.collapsed: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.scopes: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "th":
            self.scopes.append(dict(attrs).get("scope"))
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


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.stack == []
    return reader


@pytest.fixture(scope="module")
def html() -> str:
    return render_html([page()])


@pytest.fixture(scope="module")
def twice() -> str:
    """Two studies of one folder, the second without charts."""
    return render_html([page(), replace(page(), sections=(page().sections[0], page().sections[3]))])


@pytest.fixture(scope="module")
def notebook() -> str:
    return notebook_html(page())


@pytest.fixture(scope="module")
def markdown() -> str:
    return render_markdown([page()])


def test_the_page_is_well_formed_and_loads_nothing(html: str) -> None:
    reader = read(html)
    assert html.startswith("<!doctype html>")
    assert "script" not in reader.tags
    assert reader.loads == []
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_ids_differ_and_every_link_has_its_place(html: str, twice: str) -> None:
    reader = read(twice)
    assert len(reader.ids) == len(set(reader.ids))
    assert {target.removeprefix("#") for target in reader.targets} <= set(reader.ids)
    assert len(read(html).targets) == 5


def test_nothing_in_any_field_becomes_markup(html: str, notebook: str) -> None:
    for shown in (html, notebook):
        assert INJECTION not in shown
        assert "<b>.csv" not in shown
        # Some fields stand twice: the page's title, the table's for screen readers, the sections' in the contents.
        assert shown.count("&lt;script&gt;") >= 25


def test_harmful_prompts_and_answers_are_collapsed_and_harmless_ones_open(html: str) -> None:
    visible, collapsed = ("".join(texts) for texts in (read(html).visible, read(html).collapsed))
    assert HARMFUL_ANSWER in collapsed
    assert HARMFUL_PROMPT in collapsed
    assert HARMFUL_ANSWER not in visible
    assert HARMFUL_PROMPT not in visible
    assert "Harmful prompts and what the model answered: click to read." in visible
    assert "How do I cook soup?" in visible
    assert "1. Boil water.\n2. *Stir* | serve." in visible


def test_the_verdict_comes_first_and_each_warning_once_right_below(html: str, twice: str) -> None:
    texts = "".join(read(html).visible)
    places = [texts.index(each) for each in ("F* cut refusal", "35 answers", "The judge is", "Measured on", "Details")]
    contents = texts.index("Strengths")
    assert places[:3] == sorted(places[:3])
    assert places[2] < contents < places[3]
    assert texts.count("The judge is uncertain.") == 1
    # A second study in the same folder warns of the same.
    assert "".join(read(twice).visible).count("The judge is uncertain.") == 1


def test_tables_show_every_cell_under_headings_with_scope(html: str) -> None:
    reader = read(html)
    table = effects()
    squeezed = "".join("".join(reader.visible).split())
    for row in table.rows:
        assert "".join("".join(row).split()) in squeezed
    assert set(reader.scopes) == {"col", "row"}
    folded = "".join(reader.collapsed)
    assert "3:1111" in folded


def test_a_rate_has_a_bar_from_its_lower_to_its_upper_end() -> None:
    table = Table.of("t", ["method", "refused"], [["AP", "40% [32–48]"], ["none", "<1% [0–4]"], ["all", "–"]])
    shown = render_html([Page("p", (Section("s", (table,)),))])
    assert shown.count('d="M48.0 5H72.0"') == shown.count('<circle cx="60.0"') == 1
    assert shown.count("<circle") == 2
    wide = Table.of("t", [f"rate {n}" for n in range(9)], [["40% [32–48]"] * 9])
    assert "<circle" not in render_html([Page("p", (Section("s", (wide,)),))])


def test_charts_are_drawn_with_captions_and_empty_ones_are_left_out(html: str) -> None:
    assert html.count("<figure>") == html.count("<figcaption>") == 5
    assert "Nothing measured" not in html
    assert "Bands are 95 % intervals." in html


def test_the_page_says_how_to_run_it_again(html: str) -> None:
    text = "".join(read(html).visible)
    assert "demur study --config study.toml" in text
    assert 'model = "<b>.csv"' in text
    assert "seconds" in text


def test_few_sections_need_no_contents_and_an_empty_page_still_renders() -> None:
    reader = read(render_html([Page("bare", ())]))
    assert "nav" not in reader.tags
    assert "Before you rely on this" not in "".join(reader.visible)
    assert render_markdown([Page("bare", ())]) == "# bare\n"
    assert shown(Page("bare", ())) == ""
    for render in (render_html, render_markdown):
        with pytest.raises(ValueError, match="at least one page"):
            render([])


def test_a_notebook_shows_the_brief_sections_and_folds_the_rest(notebook: str) -> None:
    reader = read(notebook)
    visible, collapsed = "".join(reader.visible), "".join(reader.collapsed)
    assert "F* cut refusal" in visible
    assert METHODS[0] in visible
    assert "How do I cook soup?" in collapsed
    assert HARMFUL_ANSWER not in visible
    assert not {"html", "body", "script"} & set(reader.tags)


def test_markdown_tables_have_a_cell_for_each_column(markdown: str) -> None:
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    counts = [len(re.split(r"(?<!\\)\|", row)) - 2 for row in rows]
    assert counts == [10] * (2 + len(METHODS)) + [2] * 5
    assert rows[1] == "| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    assert rows[2].startswith(r"| **F\* (CosSim+AP)** | **c = −0** |")
    assert "| 70% [60–78]" not in markdown
    assert "72% [62–79]" in markdown


def test_markdown_takes_every_field_literally(markdown: str) -> None:
    outside = re.sub(r"^(```+).*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in outside
    assert set(re.findall(r"<(/?\w+)", outside)) == {"details", "/details", "summary", "/summary"}
    text = "1. a *b* [c](d) ![e](f) `g`\n# h\n- i_j_ | k"
    literal = render_markdown([Page("p", (Section("s", (Text(text),)),))])
    assert "1\\. a \\*b\\* [c\\](d) ![e\\](f) \\`g\\`\n\\# h\n\\- i\\_j\\_ \\| k" in literal


def test_markdown_collapses_harmful_answers_in_fences_that_they_cannot_leave() -> None:
    answer = "```\n</details>\n````\n" + HARMFUL_ANSWER
    blocks = (Transcripts("Answers", (Transcript(HARMFUL_PROMPT, (("clean", answer),)),), harmful=True),)
    text = render_markdown([Page("p", (Section("s", blocks),))])
    assert f"`````\n{answer}\n`````" in text
    inside = text[text.index("<details>") : text.rindex("</details>")]
    assert HARMFUL_PROMPT in inside
    assert HARMFUL_ANSWER in inside


def test_markdown_names_charts_and_repeats_the_run(markdown: str) -> None:
    assert "*Chart “Compliance against ΔCE”: see the HTML report.*" in markdown
    assert 'toml\nmodel = "<b>.csv"\n```' in markdown


def shown(of: Page, *, full: bool = False, width: int = 80) -> str:
    """What a terminal of that width shows; no line may be wider."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    for part in render_terminal(of, full=full, width=width):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(cell_len(line) <= width for line in text.splitlines())
    return text


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_a_terminal_shows_every_cell_whole_at_any_width(width: int) -> None:
    text = shown(page(), width=width)
    words = set(text.split())
    for row in effects().rows:
        for cell in row:
            assert set(cell.split()) <= words, cell
    for column in effects().columns:
        assert set(column.name.split()) <= words, column
    assert "…" not in text


def test_a_short_screen_has_the_finding_the_doubts_and_one_table() -> None:
    text = shown(page())
    assert text.index("F* cut refusal") < text.index("35 answers") < text.index(METHODS[0])
    assert len(text.splitlines()) <= 26
    assert "How do I cook soup?" not in text
    assert "Measured on test prompts." not in text
    last = " ".join(text[text.index("--full") :].split())
    assert last == f"--full also shows: {marked('Strengths')}, {marked('Details')}, More."


def test_a_short_screen_says_how_many_warnings_it_leaves_out() -> None:
    warnings = tuple(Text(f"doubt {n}", "warning") for n in range(6))
    text = shown(Page("p", (Section("s", warnings, brief=True),)))
    assert "doubt 3" in text
    assert "doubt 4" not in text
    assert text.endswith("--full also shows: 2 more warnings.\n")


def test_the_full_screen_has_everything_but_charts_and_harmful_answers() -> None:
    text = " ".join(shown(page(), full=True, width=300).split())
    for each in (
        "Measured on test prompts.",
        "3:1111",
        "How do I cook soup?",
        "2. *Stir* | serve.",
        'model = "<b>.csv"',
    ):
        assert each in text
    assert HARMFUL_ANSWER not in text
    assert "answers to 1 harmful prompt, only in the report, collapsed" in text
    assert "--full" not in text


def test_answers_cannot_control_the_terminal() -> None:
    transcripts = Transcripts("t", (Transcript("a\x1b[2Jb", (("[red]tag", "c\x07\x9bd"),)),), harmful=False)
    text = shown(Page("p", (Section("s", (transcripts,)),)), full=True)
    assert "a[2Jb" in text
    assert "[red]tag" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_column_help_is_explained_in_every_view() -> None:
    table = Table.of("t", ["method", Column("p", numeric=True, help="McNemar, adjusted")], [["AP", "0.04"]])
    bare = Page("p", (Section("s", (table,), brief=True),))
    assert "<strong>p</strong>: McNemar, adjusted" in render_html([bare])
    assert "- p: McNemar, adjusted" in render_markdown([bare])
    assert "p: McNemar, adjusted." in shown(bare, full=True)


def test_a_table_that_is_titled_like_its_section_is_titled_once() -> None:
    bare = Page("p", (Section("Effects", (Table.of("Effects", ["method"], [["AP"]]),), brief=True),))
    assert render_html([bare]).count(">Effects<") == 1
    assert render_markdown([bare]).count("Effects") == 1
    assert shown(bare, full=True).count("Effects") == shown(bare).count("Effects") == 1


def test_a_row_with_a_cell_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        Table.of("t", ["a", "b"], [["1", "2"], ["3"]])


def test_a_report_goes_where_it_is_told(tmp_path: Path) -> None:
    bare = [replace(page(), sections=())]
    assert write_report(bare, tmp_path / "deep" / "page.html").read_text() == render_html(bare)
    assert write_report(bare, tmp_path) == tmp_path / "report.html"
    assert write_report(bare, tmp_path / "page.md").read_text() == render_markdown(bare)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "page.md", "report.html"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write the report to .*file/page\.html.*--out"):
        write_report([Page("p", ())], tmp_path / "file" / "page.html")


def test_tokens_are_coloured_in_two_halves_and_named_where_colours_are_not_shown(html: str, markdown: str) -> None:
    assert f'--u: 100%; --l: 20%" title="{escape(marked("harm"))} 1.00, ' in html
    # A line feed is shown, and still breaks the line.
    assert ">⏎\n</span>" in html
    assert "bomb" in markdown
    assert r": \\n 0.60, bomb" in markdown
    assert "the 0.01" not in markdown


def test_a_terminal_colours_a_token_by_the_stronger_activity() -> None:
    block = Tokens(
        "T", ("harm", "refusal"), (("prompt", (Token("bad", 0.9, 0.1), Token(" end", 0.0, 0.3), Token("a"))),)
    )
    parts = render_terminal(Page("P", (Section("S", (block,)),)), full=True, width=80)
    (shown,) = [part for part in parts if getattr(part, "plain", "") == "bad enda"]
    styles = [str(span.style) for span in shown.spans]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(styles) == 2
    assert "bold" in styles[0]
    assert styles[0].split()[2] != styles[1].split()[2]
    said = [part.plain for part in parts if hasattr(part, "plain")]  # pyright: ignore[reportAttributeAccessIssue]
    assert "harm: bad 0.90" in said
    assert "refusal: end 0.30, bad 0.10" in said
