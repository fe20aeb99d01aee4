"""What README and docs promise: commands run, examples run, links lead somewhere, generated pages are up to date.

A `sh` block is run for real, on the bundled model and small splits, unless `<!-- not run: WHY -->` stands above it.
Of every block, run or not, each `demur` command is parsed, and its options, values and names must exist.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from demur.bundled import bundled_prompts
from demur.cli.app import app
from demur.cli.options import ConfigCommand, read_config
from demur.data import prompt_sets
from demur.judges import JUDGES
from demur.studies import STUDIES
from demur.studies.methods import METHODS

ROOT = Path(__file__).parents[1]
GENERATED = {ROOT / "docs/reference/cli.md", ROOT / "docs/reference/python.md"}
PAGES = sorted({ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "perf/README.md", *(ROOT / "docs").rglob("*.md")})
WRITTEN = [page for page in PAGES if page not in GENERATED]

SMALL = {
    "-n": "10,4,4,4",
    "--n-exact": "1",
    "--max-new-tokens": "8",
    "--random-sets": "2",
    "--k0": "3",
    "--direction-layer": "6",
    "--suppress": "0",
    "--induce-multiples": "1",
    "--methods": "random",
}
"""Laid over every study that the docs run: what is tested is that the command works."""
SMALL_BENCHMARK = {"--methods": "actdiff", "--n-text": "4", "--n-over-refusal": "4", "--resamples": "100"}
SMALL_HARDEN = {"--multiples": "1", "--amplify": "2", "--turn-down": "0", "--n-attacks": "12", "--n-over-refusal": "4"}
SMALL_AUDIT = {"--n-requests": "3", "--queries": "2", "--radii": "0.1"}
SMALL_PYTHON = {
    "demur.load_prompts()": 'demur.load_prompts(n="10,4,4,4")',
    "k=20)": "k=20, k0=3, direction_layer=6, max_new_tokens=8)",
    "prompts, found)": (
        "prompts, found, k0=3, direction_layer=6, max_new_tokens=8, n_exact=1, random_sets=2, methods=['random'], "
        "suppress=(0.0,), induce_multiples=(1.0,))"
    ),
}
"""What is put in place of the calls in Python examples that take minutes."""
SLOW = {
    "howto/audit.md", "howto/checkpoints.md", "howto/compare.md", "howto/dictionaries.md", "howto/features.md",
    "howto/harden.md", "howto/jailbreaks.md", "howto/runs.md", "howto/transfer.md", "tutorial.md",
}  # fmt: skip
"""Pages whose commands and examples take longer than some seconds even so."""
SLOW_COMMANDS = {"README.md", "howto/train-saes.md"}
"""Pages of which only the commands do."""

RUNNER = """
import json, sys
from demur.cli import main

for words in json.loads(sys.argv[1]):
    print("demur", *words, flush=True)
    if status := main(words):
        sys.exit(status)
"""

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
_LINK = re.compile(r"\]\(([^()\s]+)\)")


class Block(NamedTuple):
    """A fenced block; `why` says why it is not run."""

    kind: str
    body: str
    why: str | None


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT)).removeprefix("docs/")


def blocks(page: Path, kind: str) -> list[Block]:
    found = (Block(m["kind"], m["body"], m["why"]) for m in _BLOCK.finditer(page.read_text(encoding="utf-8")))
    return [block for block in found if block.kind == kind]


def commands(body: str) -> list[list[str]]:
    """The words of each command in a block, comments left out and continued lines joined."""
    lines = body.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def pages_with(kind: str) -> list[Path]:
    return [page for page in WRITTEN if blocks(page, kind)]


# -- links ---------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_every_page_of_the_docs_is_in_the_index() -> None:
    index = ROOT / "docs/index.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in _LINK.findall(index.read_text())}
    assert {page for page in PAGES if (ROOT / "docs") in page.parents} - {index} <= linked


def test_generated_pages_are_up_to_date(tmp_path: Path) -> None:
    # In a process of its own: the checks that tests put around every function would show in signatures.
    subprocess.run([sys.executable, str(ROOT / "docs/make_reference.py"), str(tmp_path)], check=True)
    for page in GENERATED:
        made = (tmp_path / page.name).read_text(encoding="utf-8")
        assert page.read_text(encoding="utf-8") == made, "run: python docs/make_reference.py"


# -- commands ------------------------------------------------------------------------------------------------------


def parse(words: list[str]) -> None:
    """Parse a `demur` command as the command line would, without running it."""
    command: click.Command | None = app
    context = click.Context(app, info_name="demur")
    rest = words
    while isinstance(command, click.Group):
        # The options of a group end where its command begins.
        _, rest, _ = command.make_parser(context).parse_args(list(rest))
        if not rest:
            return
        _, command, rest = command.resolve_command(context, rest)
    assert command is not None
    with command.make_context(str(command.name), list(rest), parent=context) as inner:
        given = {name: value for name, value in inner.params.items() if value not in (None, (), False)}
    if not isinstance(command, ConfigCommand):
        return
    fields = {name: value for name, value in given.items() if name in command.config.model_fields}
    if command.name != "plan":
        read_config(command.config, None, fields)
    for name in ("harmful", "harmless", "test_harmful", "test_harmless", "text", "over_refusal"):
        for source in fields.get(name, ()):
            file = source.partition("::")[0]
            assert "." in file or "/" in file or file in prompt_sets(), f"there is no prompt set {file}"
    for judge in (fields.get("judge"), *fields.get("harm_judges", ())):
        assert judge is None or judge.partition("=")[0] in JUDGES, f"there is no judge {judge}"
    for method in fields.get("methods", ()):
        assert method in METHODS, f"there is no method {method}"


@pytest.mark.parametrize("page", pages_with("sh"), ids=name_of)
def test_every_command_is_one_that_exists(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks(page, "sh"):
        for words in commands(block.body):
            match words:
                case ["demur", *rest]:
                    parse(rest)
                case ["make", target, *_]:
                    assert target in targets
                case ["python", "-m", module, *_] if module != "pytest":
                    assert (ROOT / module.replace(".", "/") / "__main__.py").is_file(), module
                case ["python", script, *_] if script.endswith(".py"):
                    assert (ROOT / script).is_file(), script
                case _:
                    assert words[0] in {"git", "pip", "hf", "lm-eval", "python", "cd"}, f"{page}: {words}"


def small(words: tuple[str, ...]) -> list[str]:
    """A command with small sizes laid over it, where it takes them."""
    if words[0] not in STUDIES:
        return list(words)
    known = STUDIES[words[0]].config.model_fields
    sizes = {option: value for option, value in SMALL.items() if option.strip("-").replace("-", "_") in known}
    sizes |= SMALL_BENCHMARK if words[0] == "benchmark" else {}
    sizes |= SMALL_HARDEN if words[0] in ("harden", "audit") else {}
    sizes |= SMALL_AUDIT if words[0] == "audit" else {}
    if "--tune" in words:
        sizes["--tune"] = "1"
    return [*words, *(part for option, value in sizes.items() for part in (option, value))]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the files that the docs name, in which commands are run without a network."""
    answers = [("How do I bake bread?", "Sure, here is how."), ("How do I hurt a cat?", "I cannot help with that.")]
    lines = [json.dumps({"prompt": prompt, "response": answer}) for prompt, answer in answers]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = bundled_prompts()
    for name, prompts in (("harmful", found.harmful), ("harmless", found.harmless)):
        (tmp_path / f"{name}.txt").write_text("\n".join(p.text for p in prompts), encoding="utf-8")
    for variable in ("DEMUR_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runnable(page: Path) -> list[list[str]]:
    found = [block for block in blocks(page, "sh") if block.why is None]
    return [words[1:] for block in found for words in commands(block.body) if words[0] == "demur"]


def pages_to_run(pages: list[Path], slow: Set[str] = frozenset()) -> list[Any]:
    marks = {name: [pytest.mark.slow] for name in SLOW | slow}
    return [pytest.param(page, id=name_of(page), marks=marks.get(name_of(page), [])) for page in pages]


@pytest.mark.parametrize("page", pages_to_run([page for page in pages_with("sh") if runnable(page)], SLOW_COMMANDS))
def test_commands_run(page: Path, desk: Path) -> None:
    for block in blocks(page, "toml"):
        if named := re.match(r"# (\S+\.toml)\n", block.body):
            (desk / named[1]).write_text(block.body, encoding="utf-8")
    wanted = [small(words) for words in dict.fromkeys(map(tuple, runnable(page)))]
    # In one process for the page, without the checks that tests put around every function, which make it four times
    # as slow.
    done = subprocess.run([sys.executable, "-c", RUNNER, json.dumps(wanted)], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-200:]}\n{done.stderr[-2000:]}"


# -- Python --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_to_run([ROOT / "README.md", ROOT / "docs/tutorial.md"]))
def test_python_examples_run(page: Path, desk: Path) -> None:
    """The blocks of a page run one after the other, as a reader would type them."""
    space: dict[str, object] = {}
    for block in blocks(page, "python"):
        if block.why is None:
            body = block.body
            for call, smaller in SMALL_PYTHON.items():
                body = body.replace(call, smaller)
            exec(compile(body, page.name, "exec"), space)
    assert (desk / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_python_examples_are_python(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block.body, str(page), "exec")
        for module in re.findall(r"^(?:from|import) (demur[\w.]*)", block.body, re.MULTILINE):
            __import__(module)
        for module, names in re.findall(r"^from (demur[\w.]*) import \(?([\w, ]+)", block.body, re.MULTILINE):
            for name in filter(None, (each.strip() for each in names.split(","))):
                assert hasattr(__import__(module, fromlist=[name]), name), f"{page}: {module}.{name}"


@pytest.mark.parametrize("page", pages_with("toml"), ids=name_of)
def test_toml_examples_are_toml(page: Path) -> None:
    import tomllib

    for block in blocks(page, "toml"):
        tomllib.loads(block.body)


def test_nothing_is_left_of_this_machine() -> None:
    home = os.path.expanduser("~")
    for page in PAGES:
        assert home == "/" or home not in page.read_text(encoding="utf-8"), page
