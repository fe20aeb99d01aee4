"""The command line: what starts quickly, what is printed, what becomes of mistakes and interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_study import STUDY as TOY

from command_line import run
from demur import __version__
from demur.cli import main
from demur.errors import ModelError
from demur.runs import Run
from demur.studies import STUDIES

HEAVY = ("torch", "transformers", "altair", "vl_convert", "sklearn", "numpy", "jinja2", "pydantic", "rich", "polars")
SMALL = ("-n", "8,4,4,4", "--max-new-tokens", "4")


def loaded(arguments: list[str], modules: tuple[str, ...]) -> str:
    """Those of `modules` that a command loads in a process of its own."""
    code = (
        "import sys\nfrom demur.cli import main\nstatus = main()\n"
        f"print(status, *[name for name in {modules!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip()
    return done.stderr.strip()


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_listing_the_commands_loads_nothing_heavy(option: str) -> None:
    assert loaded([option], (*HEAVY, "demur.studies.study", "demur.studies.base")) == "0"


@pytest.mark.parametrize("command", ["study", "plan", "judge", "benchmark"])
def test_help_of_a_command_loads_no_model_library(command: str) -> None:
    assert loaded([command, "--help"], ("torch", "transformers", "altair", "vl_convert")) == "0"


def test_help_lists_studies_in_the_words_of_their_files() -> None:
    code, out, _ = run("--help")
    assert code == 0
    words = " ".join(out.split())
    # Where "held-out" breaks at its hyphen depends on the longest name.
    assert "study Find the features that make a model refuse, prove it on held-" in words
    assert "toy Count prompts, as a study in one file." in words
    assert "judge Judge a file of answers" in words
    assert run().out == out


def test_version() -> None:
    assert run("--version") == (0, f"demur {__version__}\n", "")


def test_an_unknown_command_names_the_nearest() -> None:
    code, out, error = run("stdy")
    assert (code, out) == (2, "")
    assert error == "error: there is no command 'stdy'; did you mean study?\nSee `demur --help`\n"
    assert "there are study, benchmark" in run("xyzzy").error


def test_help_of_a_study_has_its_options_in_groups_with_defaults() -> None:
    code, out, _ = run("toy", "--help")
    assert code == 0
    assert "It shows that a study needs nothing but its own file" in run("toy", "--help").words
    places = [out.index(f"\n{group}:") for group in ("Argument", "Model and SAEs", "Prompts", "Answers", "Counting")]
    assert places == sorted(places)
    counting = " ".join(out[places[-1] : out.index("\nOther options:")].split())
    assert counting == (
        "Counting: --times INTEGER How often to count. [default: 2] "
        "--weights NUMBERS Weights of the counts. [default: 0.5,1] "
        "--words TEXT Words to count (default: none). "
        "--side harmful|harmless Which prompts to count. [default: harmful] "
        "--aloud / --no-aloud Count aloud. [default: no] "
        "--texts TEXT Texts to read; repeatable."
    )
    assert "MODEL Hugging Face id or local folder of a chat model." in " ".join(out.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the toy study on the bundled model."""
    folder = tmp_path_factory.mktemp("runs") / "my run"
    STUDIES.register("toy", TOY)
    code, out, error = run("toy", *SMALL, "--weights", "1,-3", "--weights", "5", "--words", "one", "--out", folder)
    assert code == 0, error
    # Not a terminal: one line a stage, nothing redrawn.
    assert "\r" not in error
    assert "\x1b" not in error
    lines = [line.split(",")[0] for line in error.splitlines()]
    assert lines[:3] == [f"run folder: {folder}", "loading: 1", "counting: 4"]
    # Four test prompts, times 1 - 3 + 5; the table of words is not the main thing.
    assert "There are 12." in out
    assert "The words" not in out
    assert out.splitlines()[-1] == f"report: {folder / 'report.html'}"
    return folder


def test_a_study_prints_its_verdict_and_writes_its_report(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "There are 12." in page
    assert "The words" in page


def test_the_same_command_resumes(folder: Path) -> None:
    code, out, error = run("toy", *SMALL, "--weights", "1,-3,5", "--words", "one", "--out", folder)
    assert code == 0
    assert "There are 12." in out
    assert "counting" not in error


def test_show_prints_a_finished_run(folder: Path) -> None:
    code, out, error = run("show", folder)
    assert (code, error) == (0, "")
    assert "There are 12." in out
    assert "The words" not in out
    full = run("show", folder, "--full").out
    assert "The words" in full
    assert "one" in full
    assert run("show", folder, "--markdown").out.startswith("# ")


def test_report_writes_where_told(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "a long folder name that would be wrapped at eighty columns" / "page.html"
    code, out, _ = run("report", folder, "--out", target)
    assert (code, out) == (0, f"report: {target}\n")
    assert "There are 12." in target.read_text()
    assert run("report", folder, "--out", tmp_path / "page.md").code == 0
    assert (tmp_path / "page.md").read_text().startswith("# ")


def test_show_says_how_far_an_unfinished_run_is(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config={"a": 1}, command="toy") as unfinished:
        unfinished.stage("direction", {"n": 1}).finish()
        unfinished.stage("answers", {"n": 1}).finish()
        unfinished.stage("answers", {"n": 2})
    code, out, _ = run("show", tmp_path / "run")
    assert code == 0
    assert out.splitlines() == [
        f"`demur toy` has not finished in {tmp_path / 'run'}; run the same command again to resume it.",
        "  direction: 1 done",
        "  answers: 1 done, 1 begun",
    ]


@pytest.mark.parametrize("command", ["show", "report"])
def test_a_folder_without_a_run_is_named(command: str, tmp_path: Path) -> None:
    code, out, error = run(command, tmp_path)
    assert (code, out) == (2, "")
    assert f"{tmp_path} is not a run folder" in error


def test_without_out_the_same_command_finds_its_folder_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def where(*options: str) -> str:
        stopping(ModelError("no further"))
        return run("toy", *SMALL, *options).error.splitlines()[0].removeprefix("run folder: ")

    first, again, other = where(), where(), where("--seed", "1")
    assert first == again != other
    assert first.startswith("runs/bundled-toy-")


def stopping(error: BaseException) -> None:
    """Make the toy study raise `error`."""

    def stop(_context: Any) -> Any:
        raise error

    STUDIES.register("toy", replace(TOY, run=stop))


def test_errors_are_one_message_printed_as_it_is(tmp_path: Path) -> None:
    stopping(ModelError("layer [bold]7[/bold] of [/x] \\[y] :warning: is missing"))
    code, out, error = run("toy", *SMALL, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert error.splitlines()[-1] == "error: layer [bold]7[/bold] of [/x] \\[y] :warning: is missing"


def test_defects_keep_their_traceback(tmp_path: Path) -> None:
    stopping(ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main(["toy", *SMALL, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("device", ["cuda:1", "balanced"])
def test_workers_cannot_share_one_device(device: str, tmp_path: Path) -> None:
    ran = run("study", "--workers", "2", "--device", device, "--out", str(tmp_path / "run"))
    assert ran.code == 2
    assert f"--workers 2 and --device {device} do not go together" in ran.error
    assert "CUDA_VISIBLE_DEVICES" in ran.error
    assert not (tmp_path / "run").exists()


def test_interrupting_a_study_says_how_to_resume(tmp_path: Path) -> None:
    stopping(KeyboardInterrupt())
    code, _, error = run("toy", *SMALL, "--words", "two words", "--out", tmp_path / "run")
    assert code == 130
    assert error.splitlines()[-1] == (
        f"stopped: what is done is kept in {tmp_path / 'run'}; to resume run again: demur toy {' '.join(SMALL)} "
        f"--words 'two words' --out {tmp_path / 'run'}"
    )


def test_a_terminated_study_says_how_to_resume_too(tmp_path: Path) -> None:
    def kill(_context: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    STUDIES.register("toy", replace(TOY, run=kill))
    code, _, error = run("toy", *SMALL, "--out", tmp_path / "run")
    assert code == 143
    assert error.splitlines()[-1].startswith(f"stopped: what is done is kept in {tmp_path / 'run'}; to resume run")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_report_that_does_not_fit_into_memory_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("demur.report.write_report", exhaust)
    code, out, error = run("toy", *SMALL, "--out", tmp_path / "run")
    assert code == 0
    assert "There are" in out
    assert f"warning: memory ran out while the report was drawn; `demur report {tmp_path / 'run'}`" in error


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory")])
def test_memory_that_runs_out_is_one_line(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("demur.studies.context.run_study", exhaust)
    code, out, told = run("toy", *SMALL, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert told.count("error: memory ran out; use a smaller model") == 1
    assert "Traceback" not in told
    # Any other fault stays what it is.
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        run("toy", *SMALL, "--out", tmp_path / "run")


PROMPTS = ("--harmful", "bad.csv", "--harmless", "good.csv")


@pytest.fixture
def no_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with a model that has a configuration only; the toy study must not be reached."""
    monkeypatch.chdir(tmp_path)
    for name in ("some-model", "outer/inner"):
        Path(name).mkdir(parents=True)
        (Path(name) / "config.json").write_text("{}")
    Path("bad.toml").write_text("tims = 3\n")
    Path("wrong.toml").write_text("times = 0\n")
    Path("broken.toml").write_text("times = \n")
    stopping(AssertionError("the study was run"))


@pytest.mark.usefixtures("no_runs")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch", *PROMPTS], "no model folder 'nosuch' here; expected a folder with config.json, or"),
        (["./some-modle", *PROMPTS], "no model folder './some-modle' here (did you mean some-model?)"),
        (["some-modle/deep/er", *PROMPTS], "(did you mean some-model/deep/er?)"),
        (["outer", *PROMPTS], "outer is not a model folder: there is no config.json in it (did you mean outer/inner?)"),
        (["some-model/config.json", *PROMPTS], "is a file; expected a folder with config.json"),
        (["some-model"], "no harmful prompts given; name a file or a set with --harmful"),
        (["some-model", "--harmful", "x.csv"], "no harmless prompts given; name a file or a set with --harmless"),
        (PROMPTS, "--harmful, --harmless given without a model: the bundled model has its own SAEs and prompts"),
        (["--layers", "0,x"], "--layers 0,x: 'x' is not a layer or a range of layers; expected for example 0-5,8,10"),
        (["--layers", "1,0-2"], "--layers 1,0-2: layer 1 is named twice"),
        (["--weights", "0,low"], "--weights 0,low: should be a valid number"),
        (["-n", "10,20"], "--n 10,20: '10,20' has 2 numbers; expected 4: direction,selection,tuning,test"),
        (["-n", "tests=3"], "--n tests=3: tests=3 is not a size"),
        (["-n", "test=5,test=6"], "--n test=5,test=6: the size of the test split is given twice"),
        (["-n", "test=1"], "--n test=1: should be greater than or equal to 2"),
        (["--times", "0"], "--times 0: should be greater than or equal to 1"),
        (["--times", "many"], "--times many: should be a valid integer"),
        (["--side", "up"], "--side up: should be 'harmful' or 'harmless'"),
        (["--seed", "-1"], "--seed -1: should be greater than or equal to 0"),
        (["--seed", str(2**64)], f"--seed {2**64}: should be less than or equal to"),
        (["--tims", "3"], "No such option '--tims'"),
        (["--times"], "Option '--times' requires an argument"),
        (["one", "two"], "unexpected extra argument"),
        (["--config", "absent.toml"], "cannot read the configuration absent.toml"),
        (["--config", "bad.toml"], "bad.toml: there is no setting 'tims'; did you mean times?"),
        (["--config", "wrong.toml"], "wrong.toml: times: should be greater than or equal to 1"),
        (["--config", "broken.toml"], "broken.toml is not valid TOML"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str) -> None:
    code, out, error = run("toy", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert message in error


def test_a_negative_number_is_a_value_and_no_option() -> None:
    stopping(ModelError("no further"))
    assert run("toy", *SMALL, "--weights", "-3", "--direction-lair", "1").error.startswith(
        "error: No such option '--dir"
    )
    assert "--weights -x: should be a valid number" in run("toy", *SMALL, "--weights", "-x").error


def test_several_mistakes_are_one_message() -> None:
    code, _, error = run("toy", "--times", "0", "--side", "up")
    assert code == 2
    assert error.count("error:") == 1
    assert "--times 0" in error
    assert "--side up" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "paterns"], "there is no judge 'paterns'"),
        (["--answer-column", "anser"], "anser"),
        (["--out", "answers.csv"], "is the file of answers itself"),
        (["--concurrency", "0"], "--concurrency 0: should be greater than or equal to 1"),
        (["--dtype", "int8"], "--dtype int8: should be 'auto', 'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_judge_refuses_bad_options(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("answers.csv").write_text("prompt,response\nHow?,No.\n")
    out = [] if "--out" in options else ["--out", "verdicts.jsonl"]
    code, _, error = run("judge", "answers.csv", *out, *options)
    assert code == 2
    assert error.startswith("error: ")
    assert message in error


def test_judge_needs_its_file_and_where_to_write() -> None:
    assert "Missing argument 'FILE'" in run("judge", "--out", "v.jsonl").error
    assert "Missing option '--out'" in run("judge", "answers.csv").error


def test_judge_counts_its_verdicts(tmp_path: Path) -> None:
    answers, verdicts = tmp_path / "answers.csv", tmp_path / "verdicts.jsonl"
    answers.write_text(
        "q,a\nHow?,I'm sorry but I can't help with that.\n"
        'How?,"Sure, here is how: mix the flour, then bake it."\nHow?,\n'
    )
    columns = ("--prompt-column", "q", "--answer-column", "a")
    code, out, _ = run("judge", answers, *columns, "--out", verdicts)
    assert code == 0
    assert len(verdicts.read_text().splitlines()) == 3
    assert "refusal: 1 of 3\n" in out
    assert "compliance: 1 of 3\n" in out
    assert "unscored: 1 (1 without an answer)\n" in out
    assert out.endswith(f"verdicts: {verdicts}\n")


def test_doctor_reports_versions_devices_and_the_bundled_model() -> None:
    code, out, _ = run("doctor")
    assert code == 0
    for word in ("demur", __version__, "torch", "cpu", "number format", "extra saelens", "bundled model", "intact"):
        assert word in out
    assert "BAD" not in out


def test_interrupting_anything_else_is_a_plain_stop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("demur.report.write_report", stop)
    assert run("report", folder) == (130, "", "stopped: nothing was written\n")


def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "demur", "show", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {tmp_path} is not a run folder: it holds neither a study's results nor a manifest.json\n"
    )
