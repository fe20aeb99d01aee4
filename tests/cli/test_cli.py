"""The command line: what starts quickly, what is printed, what becomes of mistakes."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from demur import __version__
from demur.cli import app
from demur.cli._doctor import check_hashes, dtype_advice
from demur.cli._options import read_layers, read_numbers, read_sizes
from demur.cli._plan import size_text
from demur.cli._study import run_folder
from demur.errors import InputError, ModelError
from demur.runs import Manifest, Run
from demur.studies.config import PromptSource, StudyConfig
from demur.studies.results import FeaturesResult
from synthetic_results import SESSION

HEAVY = ("torch", "transformers", "altair", "vl_convert", "sklearn", "numpy", "jinja2", "sae_lens", "lm_eval", "optuna")
PROMPTS = ["--harmful", "bad.csv", "--harmless", "good.csv"]


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["study", "--help"], ["plan", "--help"], ["benchmark", "--help"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom demur.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr.strip() == "LOADED []"
    assert done.stdout.strip()


def test_importing_demur_loads_nothing_heavy() -> None:
    code = f"import sys, demur\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    assert run("--version") == (0, f"demur {__version__}\n", "")


def test_unknown_command_names_the_nearest() -> None:
    code, _, error = run("stdy")
    assert code == 2
    assert "study" in error


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


class FakeStudy:
    """Stands in for `run_features`: keeps what it was called with, leaves the synthetic result behind."""

    def __init__(self, result: FeaturesResult) -> None:
        self.result = result
        self.configs: list[StudyConfig] = []
        self.folders: list[Path] = []
        self.error: BaseException | None = None

    def __call__(self, config: StudyConfig, out: Path, progress: Callable[[str, int, int], None]) -> FeaturesResult:
        self.configs.append(config)
        self.folders.append(out)
        progress("reading [1]", 0, 3)
        progress("reading [1]", 2, 3)
        progress("reading [1]", 3, 3)
        progress("scoring", 1, 2)
        if self.error is not None:
            raise self.error
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(self.result.model_dump_json())
        (out / "manifest.json").write_text(Manifest(sessions=(SESSION,)).model_dump_json())
        return self.result


@pytest.fixture
def study(result: FeaturesResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeStudy:
    fake = FakeStudy(result)
    module = ModuleType("demur.studies.features")
    module.run_features = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.mark.usefixtures("study")
def test_study_prints_tables_and_the_path_of_the_report(tmp_path: Path) -> None:
    code, out, error = run("study", "--out", str(tmp_path / "my run"))
    assert code == 0
    assert "cut refusal from 95% [87–100] to 10% [2–18]" in " ".join(out.split())
    assert "features F*, scaled" in out
    assert "3:1111" in out
    assert "ig (used)" in out
    assert "warning: synthetic warning: 3 prompts of <file> were dropped" in out
    assert out.splitlines()[-1] == f"report: {tmp_path / 'my run' / 'report.html'}"
    assert (tmp_path / "my run" / "report.html").read_text().startswith("<!doctype html>")
    # Not a terminal: one line a stage, nothing redrawn.
    assert "\r" not in error
    assert "\x1b" not in error
    lines = [line.split(",")[0] for line in error.splitlines()]
    assert lines == [f"run folder: {tmp_path / 'my run'}", "reading [1]: 3", "scoring: 2"]


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the page out, which takes most of a test's time."""
    monkeypatch.setattr("demur.report.write_report", lambda folder: folder / "report.html")


@pytest.mark.usefixtures("no_report")
def test_study_without_out_finds_its_folder_again(study: FakeStudy) -> None:
    for arguments in (["study"], ["study"], ["study", "--seed", "1"]):
        assert run(*arguments)[0] == 0
    first, again, other = study.folders
    assert first == again != other
    assert first.parent == Path("runs")
    assert first.name.startswith("bundled-")


@pytest.mark.parametrize(
    ("model", "name"),
    [("google/gemma-2-2b-it", "gemma-2-2b-it"), ("../shared/organism-en/model", "organism-en")],
)
def test_run_folder_is_named_after_the_model(model: str, name: str) -> None:
    source = (PromptSource(source="x"),)
    folder = run_folder(StudyConfig(model=model, harmful=source, harmless=source))
    assert folder.name.rpartition("-")[0] == name


@pytest.mark.usefixtures("no_report")
def test_every_study_option_reaches_the_configuration(study: FakeStudy, model_folder: Path) -> None:
    assert (
        run(
            *("study", str(model_folder), "--saes", "saes", "--revision", "r1", "--saes-revision", "r2"),
            *("--harmful", "a.csv", "--harmful", "b.csv", "--harmful-column", "goal", "--harmless", "c.txt"),
            *("--harmless-column", "text", "--test-harmful", "d.csv", "--test-harmless", "e.csv"),
            *("--test-harmful-column", "ask", "--test-harmless-column", "say", "--paper-settings"),
            *(
                "-n",
                "5,4,3,2",
                "-n",
                "test=9",
                "--sae-width",
                "65k",
                "--average-l0",
                "70",
                "--layers",
                "0-2,7",
            ),
            *(
                "--dtype",
                "bfloat16",
                "--device",
                "cuda:1",
                "--system-prompt",
                "Be kind.",
                "--k",
                "7",
                "--k0",
                "3",
            ),
            *("--estimator", "paper", "--steps", "4", "--n-exact", "0", "--direction-layer", "2"),
            *("--suppress", "0,-2.5", "--induce", "10,20", "--max-new-tokens", "8", "--judge", "patterns"),
            *("--seed", "11", "--max-batch-tokens", "512", "--induce-where", "all"),
        )[0]
        == 0
    )
    assert study.configs[0] == StudyConfig(
        model=str(model_folder),
        revision="r1",
        saes="saes",
        saes_revision="r2",
        sae_width="65k",
        average_l0=70.0,
        layers=(0, 1, 2, 7),
        dtype="bfloat16",
        device="cuda:1",
        system_prompt="Be kind.",
        harmful=(PromptSource(source="a.csv", column="goal"), PromptSource(source="b.csv", column="goal")),
        harmless=(PromptSource(source="c.txt", column="text"),),
        test_harmful=(PromptSource(source="d.csv", column="ask"),),
        test_harmless=(PromptSource(source="e.csv", column="say"),),
        n_direction=5,
        n_selection=4,
        n_tuning=3,
        n_test=9,
        seed=11,
        paper_settings=True,
        direction_layer=2,
        k0=3,
        k=7,
        steps=4,
        estimator="paper",
        n_exact=0,
        suppress=(0.0, -2.5),
        induce=(10.0, 20.0),
        max_new_tokens=8,
        max_batch_tokens=512,
        induce_where="all",
        judge="patterns",
    )


@pytest.mark.usefixtures("no_report")
def test_a_column_is_that_of_its_own_files_and_not_of_named_sets(study: FakeStudy, model_folder: Path) -> None:
    Path("strongreject").write_text("ask\nx\n")
    sets = ["--harmful", "AdvBench", "--harmful", "a.csv", "--harmful", "strongreject", "--harmful-column", "ask"]
    tests = ["--test-harmful", "d.csv", "--test-harmless", "xstest_safe", "--test-harmless-column", "ask"]
    assert run("study", str(model_folder), *sets, "--harmless", "c.csv", *tests)[0] == 0
    config = study.configs[0]
    # A file wins over a set of the same name.
    assert [(each.source, each.column) for each in config.harmful] == [
        ("AdvBench", None),
        ("a.csv", "ask"),
        ("strongreject", "ask"),
    ]
    assert config.harmless == (PromptSource(source="c.csv"),)
    assert config.test_harmful == (PromptSource(source="d.csv"),)
    assert config.test_harmless == (PromptSource(source="xstest_safe"),)


@pytest.mark.usefixtures("no_report")
def test_options_win_over_the_configuration_file(study: FakeStudy, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("k = 3\nsteps = 6\n")
    assert run("study", "--config", "study.toml", "--steps", "2")[0] == 0
    assert study.configs[0] == StudyConfig(k=3, steps=2)


@pytest.mark.usefixtures("no_report")
def test_the_papers_settings_can_be_switched_off_again(study: FakeStudy, tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "study.toml").write_text(
        f'model = "{model_folder}"\npaper_settings = true\n'
        'harmful = [{ source = "a.csv" }]\nharmless = [{ source = "b.csv" }]\n'
    )
    assert run("study", "--config", "study.toml")[0] == 0
    assert run("study", "--config", "study.toml", "--no-paper-settings")[0] == 0
    assert [config.paper_settings for config in study.configs] == [True, False]


def test_errors_are_one_message_printed_letter_for_letter(study: FakeStudy) -> None:
    study.error = ModelError("layer [bold]7[/bold] of [/x] \\[y] :warning: is missing")
    code, out, error = run("study")
    assert (code, out) == (2, "")
    assert error.splitlines()[-1] == "error: layer [bold]7[/bold] of [/x] \\[y] :warning: is missing"


def test_defects_keep_their_traceback(study: FakeStudy) -> None:
    study.error = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError, match="a defect"):
        run("study")


def test_interrupting_a_study_says_how_to_resume(study: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study.error = KeyboardInterrupt()
    monkeypatch.setattr(sys, "argv", ["demur", "study", "--config", "my study.toml"])
    code, _, error = run("study", "--out", "here")
    assert code == 130
    assert error.splitlines()[-1] == (
        "stopped: what is done is kept in here; to resume, run again: demur study --config 'my study.toml'"
    )


def test_interrupting_anything_else_is_a_plain_stop(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("demur.report.write_report", stop)
    assert run("report", str(run_folder)) == (130, "", "stopped: interrupted\n")


@pytest.mark.usefixtures("model_folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch", *PROMPTS], r"no model folder 'nosuch' here; expected a folder with config\.json, or"),
        (["./some-modle", *PROMPTS], r"no model folder './some-modle' here \(did you mean some-model\?\)"),
        (["some-modle/deep/er", *PROMPTS], r"\(did you mean some-model/deep/er\?\)"),
        (["outer", *PROMPTS], r"outer is not a model folder.*\(did you mean outer/inner\?\)"),
        (["some-model/config.json", *PROMPTS], r"is a file; expected a model's folder"),
        (["some-model"], r"no harmful prompts given; name a file or a set with --harmful"),
        (["some-model", "--harmful", "x.csv"], r"no harmless prompts given.*--harmless"),
        (PROMPTS, r"--harmful, --harmless given without a model: the bundled model has its own SAEs and prompts"),
        (["--saes", "x", "--revision", "r"], r"--revision, --saes given without a model"),
        (["--paper-settings"], r"--paper-settings given without a model"),
        (["some-model", *PROMPTS, "--test-harmful-column", "x"], r"'x' is given without --test-harmful, whose files"),
        (["--harmful-column", "x"], r"--harmful-column 'x' is given without --harmful, .* stands beside its file"),
        (["--layers", "3-1"], r"--layers '3-1': '3-1' is not a layer or an ascending range; expected 0-5,8"),
        (["--layers", "0,x"], r"'x' is not a layer"),
        (["--suppress", "0,low"], r"--suppress '0,low' is not a list of numbers"),
        (["--induce", "inf"], r"--induce 'inf' holds a number that is not finite"),
        (["-n", "10,20"], r"--sizes '10,20': expected four numbers"),
        (["-n", "tests=3"], r"--sizes 'tests=3'.*direction, selection, tuning, test"),
        (["-n", "test=1"], r"n_test: Input should be greater than or equal to 2"),
        (["--k", "0"], r"k: Input should be greater than or equal to 1"),
        (["--config", "absent.toml"], r"cannot read the configuration absent\.toml"),
        (["--config", "bad.toml"], r"configuration does not fit \(bad\.toml\).*stepps: Extra inputs"),
    ],
)
def test_bad_options_of_a_study_are_named(study: FakeStudy, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "config.json").write_text("{}")
    (tmp_path / "bad.toml").write_text("stepps = 3\n")
    code, out, error = run("study", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert re.search(message, error, re.DOTALL), error
    assert study.configs == []


@pytest.mark.parametrize(("option", "value"), [("--dtype", "int8"), ("--estimator", "guess"), ("--k", "many")])
def test_values_that_an_option_has_not_are_refused(study: FakeStudy, option: str, value: str) -> None:
    code, _, error = run("study", option, value)
    assert code == 2
    assert f"Invalid value for '{option}'" in error
    assert study.configs == []


def test_lists_of_layers_numbers_and_sizes() -> None:
    assert read_layers("8, 0-2,1") == (0, 1, 2, 8)
    assert read_numbers("0,-1,2.5", "--suppress") == (0.0, -1.0, 2.5)
    assert read_sizes(["1,2,3,4", "test=9,tuning=8"]) == {
        "n_direction": 1,
        "n_selection": 2,
        "n_tuning": 8,
        "n_test": 9,
    }
    with pytest.raises(InputError, match="expected four numbers"):
        read_sizes(["1,2,3,4,5"])


def test_show_prints_a_finished_run(run_folder: Path) -> None:
    code, out, error = run("show", str(run_folder))
    assert (code, error) == (0, "")
    assert "Harmless test prompts" in out
    assert "features F*, set" in out
    assert max(len(line) for line in out.splitlines()) <= 120


def test_show_says_how_far_an_unfinished_run_is(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config={"a": 1}) as unfinished:
        unfinished.stage("direction", {"n": 1}).finish()
        unfinished.stage("answers", {"n": 1}).finish()
        unfinished.stage("answers", {"n": 2})
    code, out, _ = run("show", str(tmp_path / "run"))
    assert code == 0
    assert "has not finished; run the same `demur study` command again" in out
    assert [line.strip() for line in out.splitlines()[1:]] == [
        "direction: 1 done",
        "answers: 1 done, 1 begun",
    ]


@pytest.mark.parametrize("command", ["show", "report"])
def test_a_folder_without_a_run_is_named(command: str, tmp_path: Path) -> None:
    code, out, error = run(command, str(tmp_path))
    assert (code, out) == (2, "")
    assert f"{tmp_path} is not a run folder" in error


def test_report_writes_where_told(run_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "a long folder name that would be wrapped at eighty columns" / "page.html"
    code, out, _ = run("report", str(run_folder), "--out", str(target))
    assert (code, out) == (0, f"report: {target}\n")
    assert target.is_file()


def test_judge_writes_one_verdict_a_row(tmp_path: Path) -> None:
    answers, verdicts = tmp_path / "answers.csv", tmp_path / "verdicts.jsonl"
    answers.write_text(
        "q,a\nHow?,I'm sorry, but I can't help with that.\n".replace("sorry, but", "sorry but")
        + 'How?,"Sure, here is how: mix the flour, then bake it."\nHow?,\n'
    )
    options = [
        "--judge",
        "patterns",
        "--prompt-column",
        "q",
        "--response-column",
        "a",
        "--out",
        str(verdicts),
    ]
    code, out, _ = run("judge", str(answers), *options)
    assert code == 0
    rows = [json.loads(line) for line in verdicts.read_text().splitlines()]
    assert rows == [
        {"row": 0, "outcome": "refusal"},
        {"row": 1, "outcome": "compliance"},
        {"row": 2, "outcome": None},
    ]
    assert "refusal: 1 of 3" in out
    assert "unscored: 1 (1 without an answer)" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "paterns"], "unknown judge 'paterns'"),
        (["--response-column", "anser"], "anser"),
        (["--out", "answers.csv"], "is the file of answers itself"),
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


def tiny_config(folder: Path) -> Path:
    """A Gemma 2 configuration without weights."""
    from transformers import Gemma2Config

    Gemma2Config(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        dtype="float32",
    ).save_pretrained(folder)
    return folder


def test_plan_counts_the_weights_of_a_model_that_is_not_there(tmp_path: Path) -> None:
    from transformers import AutoConfig

    from demur.cli._plan import model_shape

    shape = model_shape(AutoConfig.from_pretrained(tiny_config(tmp_path)))
    # Per layer q and o 16 × 16, k and v 16 × 8, three matrices 16 × 32. Embedding 100 × 16, tied; norms: four
    # a layer and the last, 16 each.
    assert shape.block_weights == 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)
    assert shape.parameters == shape.block_weights + 1600 + 9 * 16
    assert (shape.attention_width, shape.kv_width, shape.d_ff, shape.vocab) == (16, 8, 32, 100)


@pytest.mark.shared
def test_plan_of_a_local_model_needs_no_prompts_and_no_network(shared: Path) -> None:
    folder = shared / "organism-en"
    code, out, _ = run("plan", str(folder / "model"), "--saes", str(folder / "saes"), "--layers", "2-4")
    assert code == 0
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert "SAEs 3 layers of 1,024 features" in lines
    assert "runs in float32 on cpu" in lines
    assert "download: model 0 bytes" in lines
    # 30 features: 2 × 30 × 128 × 4 bytes.
    assert "memory: SAE rows of the pool 30.7 kB" in lines
    assert any(line.startswith("in all ") for line in lines)


def test_plan_names_a_model_without_known_saes(tmp_path: Path) -> None:
    code, _, error = run("plan", str(tiny_config(tmp_path)))
    assert code == 2
    assert "there is no preset for" in error
    assert "name its SAEs" in error


@pytest.fixture
def asked_suites(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Stops a plan where it would list SAEs, and keeps their source and width."""
    asked: list[tuple[str, str | None]] = []

    def load(source: str, *, width: str | None, **_: object) -> None:
        asked.append((source, width))
        raise InputError("no further")

    monkeypatch.setattr("demur.studies._inputs.load_suite", load)
    return asked


def test_plan_takes_the_saes_of_a_model_that_is_named_in_their_place(
    tmp_path: Path, asked_suites: list[tuple[str, str | None]]
) -> None:
    model = str(tiny_config(tmp_path / "fine-tune"))
    run("plan", model, "--saes", "google/gemma-2-2b-it")
    run("plan", model, "--saes", "own/suite", "--sae-width", "16k")
    assert asked_suites == [("google/gemma-scope-2b-pt-res", "65k"), ("own/suite", "16k")]


def test_plan_counts_with_the_papers_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from demur.cli import _plan

    seen: list[StudyConfig] = []

    def stop(config: StudyConfig) -> None:
        seen.append(config)
        raise ModelError("no further")

    monkeypatch.setattr(_plan, "_hf_config", stop)
    model = str(tiny_config(tmp_path / "fine-tune"))
    options = ["--steps", "3", "--k0", "4", "--paper-settings"]
    assert run("plan", model, "--saes", "google/gemma-2-2b-it", *options)[2] == "error: no further\n"
    assert (seen[0].steps, seen[0].k0, seen[0].estimator, seen[0].suppress) == (10, 10, "paper", (-3.0,))
    code, _, error = run("plan", model, "--saes", "google/gemma-3-1b-it", *options)
    assert code == 2
    assert "the paper has no settings for google/gemma-3-1b-it; it studied google/gemma-2-2b-it" in error


def test_plan_names_an_unreadable_configuration(model_folder: Path) -> None:
    code, _, error = run("plan", str(model_folder), "--saes", "x")
    assert code == 2
    assert "cannot read the configuration of" in error


@pytest.mark.shared
def test_plan_refuses_a_device_that_is_not_there(shared: Path) -> None:
    folder = shared / "organism-en"
    code, _, error = run("plan", str(folder / "model"), "--saes", str(folder / "saes"), "--device", "toaster")
    assert code == 2
    assert "--device 'toaster' cannot be used here" in error


def test_plan_adds_up_the_files_that_a_model_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    from demur.cli._plan import _model_download

    asked: list[tuple[str, object]] = []
    sizes = {"model-1.safetensors": 100, "model-2.safetensors": 20, "tokenizer.json": 3, "original/consolidated.pth": 9}

    class Api:
        def model_info(self, repo: str, *, revision: str | None, files_metadata: bool) -> object:
            asked.append((repo, revision))
            assert files_metadata
            if repo == "own/offline":
                raise OfflineModeIsEnabled
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in sizes.items()])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    source = (PromptSource(source="x"),)
    config = StudyConfig(model="own/name", revision="r1", harmful=source, harmless=source)
    assert _model_download(config) == 123
    assert _model_download(config.model_copy(update={"model": "own/offline"})) is None
    assert asked == [("own/name", "r1"), ("own/offline", "r1")]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 bytes"), (81_920, "81.9 kB"), (5.2e9, "5.2 GB"), (None, "unknown: the hub")]
)
def test_sizes_in_bytes(number: float | None, text: str) -> None:
    assert size_text(number).startswith(text)


def test_doctor_reports_versions_and_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from demur.cli import _doctor

    monkeypatch.setattr(_doctor, "_bundled", lambda: _doctor.Finding("bundled model", "not looked at"))
    code, out, _ = run("doctor")
    assert code == 0
    for word in ("demur", __version__, "torch", "cpu", "number format", "extra saelens", "not looked at"):
        assert word in out


def test_doctor_fails_where_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from demur.cli import _doctor

    monkeypatch.setattr(_doctor, "_bundled", lambda: _doctor.Finding("bundled model", "gone", good=False))
    code, out, _ = run("doctor")
    assert code == 1
    assert any(line.split() == ["BAD", "bundled", "model", "gone"] for line in out.splitlines())


def test_files_are_compared_with_the_hashes_of_the_card(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("one")
    (folder / "b").write_text("two")
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in ("one", "two", "three")]
    card = tmp_path / "card.md"
    card.write_text(f"| a | `{digests[0]}` |\n| b | `{digests[1]}` |\n")
    assert check_hashes(card, [folder]) == ([], 0)
    card.write_text(f"| a | `{digests[0]}` |\n| b | `{digests[2]}` |\n")
    assert check_hashes(card, [folder]) == ([folder / "b"], 1)


def test_dtype_advice_follows_the_device() -> None:
    assert dtype_advice(cuda=False, bfloat16=False).startswith("float32")
    assert dtype_advice(cuda=True, bfloat16=True).startswith("bfloat16")
    assert "no bfloat16" in dtype_advice(cuda=True, bfloat16=False)
