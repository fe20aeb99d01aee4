from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import demur
from demur.errors import RunError
from demur.runs import Run, Stage, StageCount, hash_of, key_versions, read_run, stage_key
from demur.types import Answer, FeatureId, FeatureSet, Prompt, PromptSet, Take, Value, Verdict

ROW = Answer(prompt=Prompt(id="p:0", text="How?"), text="I won't.")


def row(number: int) -> Answer:
    return ROW.model_copy(update={"prompt": Prompt(id=f"p:{number}", text="How?")})


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.open(tmp_path / "run", config={"model": "tiny"}) as run:
        yield run


@pytest.fixture
def stage(run: Run) -> Stage:
    return run.stage("generate", {"model": "tiny"})


@dataclass(frozen=True)
class Arrow:
    """A value with tensors, as directions and attributions are."""

    layer: int
    scores: tuple[float, ...]
    vector: Tensor

    def to_parts(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        return {"vector": self.vector}, {"layer": self.layer, "scores": list(self.scores)}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        return cls(meta["layer"], tuple(meta["scores"]), tensors["vector"])


# --- the manifest


def test_the_manifest_says_what_was_asked_and_with_what(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", config={"model": "tiny", "k": 20}, seeds={"split": 7}) as run:
        run.record(inputs={"harmful": "ab" * 32})
        run.record(identities={"model": {"repo": "google/gemma-2-2b-it", "revision": "abc"}})
        run.stage("direction", {"k": 20})
    session = read_run(tmp_path / "r").manifest.latest
    assert session.config == {"model": "tiny", "k": 20}
    assert session.config_hash == hash_of({"k": 20, "model": "tiny"})
    assert session.inputs == {"harmful": "ab" * 32}
    assert session.identities == {"model": {"repo": "google/gemma-2-2b-it", "revision": "abc"}}
    assert session.seeds == {"split": 7}
    assert session.versions["torch"] == importlib.metadata.version("torch")
    assert session.python == ".".join(map(str, sys.version_info[:3]))
    assert session.finished is not None
    assert [ref.name for ref in session.stages] == ["direction"]


def test_an_interrupted_session_is_not_marked_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Run.open(tmp_path / "r", config={}):
        raise KeyboardInterrupt
    assert read_run(tmp_path / "r").manifest.latest.finished is None
    with Run.open(tmp_path / "r", config={}):
        pass
    assert [s.finished is None for s in read_run(tmp_path / "r").manifest.sessions] == [True, False]


def test_secrets_are_never_written(tmp_path: Path) -> None:
    token = "hf_" + "A" * 30
    config = {
        "token": "plain-looking",
        "hub": {"hf_token": token, "api_key": "k-1"},
        "url": "https://me:hunter2@example.org/model",
        "note": f"used {token}",
        "max_new_tokens": 64,
        "refusal_token": "I",
    }
    with Run.open(tmp_path / "r", config=config) as run:
        run.record(identities={"model": {"token": token}})
        run.stage("direction", {"password": "swordfish", "k": 20})
    written = "".join(path.read_text() for path in (tmp_path / "r").rglob("*.json"))
    for secret in ("plain-looking", token, "k-1", "hunter2", "swordfish"):
        assert secret not in written
    kept = read_run(tmp_path / "r").manifest.latest.config
    assert (kept["max_new_tokens"], kept["refusal_token"]) == (64, "I")


# --- stage keys

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=5), st.randoms())
def test_a_key_does_not_depend_on_the_order_of_its_dependencies(depends: dict[str, Any], random: Any) -> None:
    items = list(depends.items())
    random.shuffle(items)
    assert stage_key("s", dict(items)) == stage_key("s", depends)


@pytest.mark.parametrize(
    "other",
    [
        stage_key("s", {"a": 2, "b": [1, 2]}),
        stage_key("s", {"a": 1, "b": [2, 1]}),
        stage_key("s", {"a": 1, "c": [1, 2]}),
        stage_key("t", {"a": 1, "b": [1, 2]}),
        stage_key("s", {"a": 1, "b": [1, 2]}, {**key_versions(), "torch": "1.0"}),
        stage_key("s", {"a": 1, "b": [1, 2]}, {**key_versions(), "transformers": "1.0"}),
        stage_key("s", {"a": 1, "b": [1, 2]}, {**key_versions(), "demur": "99.0"}),
        stage_key("s", {"a": True, "b": [1, 2]}),
    ],
)
def test_a_key_changes_with_each_thing_it_depends_on(other: str) -> None:
    assert stage_key("s", {"a": 1, "b": (1, 2)}) != other


def test_a_key_is_the_hash_of_canonical_json() -> None:
    text = '{"depends":{"a":1,"b":"é"},"format":2,"stage":"s","versions":{"torch":"2"}}'
    assert stage_key("s", {"b": "é", "a": 1}, {"torch": "2"}) == hashlib.sha256(text.encode()).hexdigest()


def test_the_installed_versions_are_part_of_every_key(stage: Stage) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    versions["demur"] = ".".join(demur.__version__.split(".")[:2])
    assert key_versions() == versions
    assert stage.key == stage_key("generate", {"model": "tiny"}, versions)
    about = json.loads((stage.folder / "stage.json").read_text())
    assert about["versions"] == versions


@pytest.mark.parametrize("bad", [float("nan"), object(), [b"x"]])
def test_what_has_no_json_form_cannot_be_depended_on(bad: object) -> None:
    with pytest.raises(RunError, match="s: depends has no JSON form"):
        stage_key("s", {"x": bad})


def test_another_configuration_gets_its_own_folder_and_nothing_is_overwritten(tmp_path: Path) -> None:
    for k in (10, 20):
        with Run.open(tmp_path / "r", config={"k": k}) as run:
            stage = run.stage("select", {"k": k})
            stage.append("rows", row(k))
            stage.finish()
    folders = sorted(path.name for path in (tmp_path / "r" / "stages").iterdir())
    assert folders == sorted(f"select-{stage_key('select', {'k': k})[:12]}" for k in (10, 20))
    with Run.open(tmp_path / "r", config={"k": 10}) as run:
        stage = run.stage("select", {"k": 10})
        assert stage.done
        assert stage.rows("rows", Answer) == [row(10)]
    (found,) = read_run(tmp_path / "r").stages("select")
    assert found.rows("rows", Answer) == [row(10)]
    assert json.loads((found.folder / "stage.json").read_text())["depends"] == {"k": 10}
    assert read_run(tmp_path / "r").stages("direction") == []


def test_one_session_may_use_a_stage_with_several_dependencies(run: Run) -> None:
    stages = [run.stage("generate", {"scale": scale}) for scale in (0.0, -1.0)]
    assert run.stage("generate", {"scale": 0.0}) is stages[0]
    view = read_run(run.folder)
    assert [s.key for s in view.stages("generate")] == [s.key for s in stages]


# --- values, tensors, rows

texts = st.text(st.characters(exclude_categories=["Cs"]))
answers = st.builds(
    Answer, prompt=st.builds(Prompt, id=texts, text=texts), intervention=texts, text=texts, finished=st.booleans()
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(answers, max_size=6))
def test_rows_come_back_equal(stage: Stage, values: list[Answer]) -> None:
    name = f"rows-{len(list(stage.folder.iterdir()))}"
    for value in values:
        stage.append(name, value)
    stage.save(f"{name}-whole", values)
    assert stage.rows(name, Answer) == values
    assert stage.load(f"{name}-whole", list[Answer]) == values


def test_values_come_back_equal(stage: Stage) -> None:
    prompts = PromptSet(name="é", prompts=(Prompt(id="a:0", text='line\nbreak "x" \u2028', label="harmful"),))
    features = FeatureSet(
        features=(FeatureId(3, 17), FeatureId(0, 2)), scores=(0.1, float("inf")), scope="global", method="ap"
    )
    stage.save("prompts", prompts)
    stage.save("features", features)
    assert stage.load("prompts", PromptSet) == prompts
    assert stage.load("features", FeatureSet) == features
    stage.save("numbers", (0.1, float("-inf")))
    assert stage.load("numbers", tuple[float, ...]) == (0.1, float("-inf"))


@dataclass(frozen=True)
class Tensors:
    """Nothing but tensors."""

    tensors: Mapping[str, Tensor]

    def to_parts(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        return self.tensors, {}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        assert not meta
        return cls(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_tensors_come_back_equal_whatever_their_layout(stage: Stage, dtype: torch.dtype) -> None:
    base = torch.arange(12).reshape(3, 4).to(dtype)
    tensors = {"whole": base, "turned": base.T, "slice": base[1:, :2], "scalar": base[0, 1], "none": base[:0]}
    stage.save("t", Tensors(tensors))
    loaded = stage.load("t", Tensors).tensors
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)


def test_a_slice_of_a_large_tensor_does_not_take_the_whole_to_disk(stage: Stage) -> None:
    stage.save("row", Tensors({"row": torch.zeros(1000, 1000)[5]}))
    assert (stage.folder / "row.safetensors").stat().st_size < 5000


def test_values_with_tensors_come_back_equal(stage: Stage) -> None:
    arrow = Arrow(3, (0.1, float("nan")), torch.randn(8, requires_grad=True))
    stage.save("arrow", arrow)
    loaded = stage.load("arrow", Arrow)
    assert loaded.layer == 3
    assert loaded.scores[0] == 0.1
    assert torch.equal(loaded.vector, arrow.vector.detach())
    assert not loaded.vector.requires_grad


def test_a_damaged_or_foreign_file_is_named(stage: Stage) -> None:
    stage.save("arrow", Arrow(0, (), torch.zeros(2)))
    path = stage.folder / "arrow.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunError, match=r"arrow\.safetensors"):
        stage.load("arrow", Arrow)
    stage.save("bare", Tensors({"x": torch.zeros(2)}))
    with pytest.raises(RunError, match=r"bare\.safetensors: not a Arrow"):
        stage.load("bare", Arrow)
    stage.save("verdict", Verdict(outcome=None, judge="j"))
    with pytest.raises(RunError, match=r"verdict\.json: not a PromptSet"):
        stage.load("verdict", PromptSet)
    with pytest.raises(RunError, match=r"absent\.json does not exist"):
        stage.load("absent", Verdict)
    with pytest.raises(RunError, match=r"absent\.jsonl does not exist"):
        stage.load("absent", list[Verdict])


def test_a_failed_write_leaves_the_old_file_and_no_debris(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.save("verdict", Verdict(outcome=None, judge="old"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"verdict\.json cannot be written: No space left"):
        stage.save("verdict", Verdict(outcome=None, judge="new"))
    monkeypatch.undo()
    assert stage.load("verdict", Verdict).judge == "old"
    assert sorted(path.name for path in stage.folder.iterdir()) == ["stage.json", "verdict.json"]


def test_a_finished_stage_is_only_read(stage: Stage) -> None:
    stage.append("rows", ROW)
    assert not stage.done
    stage.finish()
    assert stage.done
    writes: list[Callable[[], None]] = [
        lambda: stage.append("rows", ROW),
        lambda: stage.save("x", ROW),
        lambda: stage.save("x", [ROW]),
        lambda: stage.save("x", Tensors({})),
        stage.finish,
    ]
    for write in writes:
        with pytest.raises(RunError, match="finished"):
            write()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A", ".hidden", "x y"])
def test_names_stay_inside_the_folder(stage: Stage, run: Run, name: str) -> None:
    with pytest.raises(RunError, match="cannot be the name"):
        stage.append(name, ROW)
    with pytest.raises(RunError, match="cannot be the name"):
        run.stage(name, {})


# --- values computed once, rows by key


def test_a_value_is_computed_once_and_given_as_it_was_read_back(tmp_path: Path) -> None:
    calls: list[str] = []
    steps: list[tuple[int, int]] = []

    def compute() -> Arrow:
        calls.append("arrow")
        return Arrow(3, (0.1,), torch.ones(2, requires_grad=True))

    counters: list[Mapping[str, StageCount]] = []
    for _ in range(2):
        with Run.open(tmp_path / "r", config={}) as run:
            for _ in range(2):
                found = run.cached("direction", {"k": 1}, Arrow, compute, progress=lambda *step: steps.append(step))
                assert not found.vector.requires_grad
                assert (found.layer, found.vector.tolist()) == (3, [1, 1])
            counters.append(run.counters)
    assert calls == ["arrow"]
    assert steps == [(0, 1), (1, 1)]
    assert counters == [{"direction": StageCount(found=0, made=1)}, {"direction": StageCount(found=1, made=0)}]


def test_lists_and_plain_values_need_no_class_of_their_own(run: Run) -> None:
    numbers = run.cached("peaks", {}, tuple[float, ...], lambda: (0.5, float("nan"), 2.0))
    assert (numbers[0], str(numbers[1]), numbers[2]) == (0.5, "nan", 2.0)
    assert run.cached("rows", {}, list[Answer], lambda: [row(0), row(1)]) == [row(0), row(1)]
    assert run.cached("none", {}, list[Answer], list) == []
    assert run.cached("counts", {}, dict[str, int], lambda: {"a": 1}) == {"a": 1}
    assert run.counters["rows"] == StageCount(found=0, made=2)
    assert read_run(run.folder).stages("rows")[0].load("rows", list[Answer]) == [row(0), row(1)]


def test_a_computation_that_fails_is_not_taken_for_done(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        run.cached("ratio", {}, float, lambda: 1 / 0)
    assert run.cached("ratio", {}, float, lambda: 0.5) == 0.5


def test_another_dependency_computes_anew(run: Run) -> None:
    assert [run.cached("n", {"k": k}, int, lambda k=k: k) for k in (1, 2, 1)] == [1, 2, 1]
    assert run.counters["n"] == StageCount(found=0, made=2)


def test_rows_are_resumed_by_key_and_come_in_the_order_of_the_keys(tmp_path: Path) -> None:
    keys = [f"p:{number}" for number in (4, 0, 3, 1, 2)]
    steps: list[tuple[int, int]] = []
    computed: list[int] = []

    def compute(take: Take, stop: int | None = None) -> Iterator[list[Answer]]:
        for start in range(0, 5, 2):
            if start == stop:
                raise KeyboardInterrupt
            batch = range(start, min(start + 2, 5))
            if take([f"p:{number}" for number in batch]):
                computed.append(start)
                yield [row(number) for number in batch]

    with pytest.raises(KeyboardInterrupt), Run.open(tmp_path / "r", config={}) as run:
        run.mapped("answers", {}, Answer, keys, lambda take: compute(take, stop=2))
    counters: list[Mapping[str, StageCount]] = []
    for _ in range(2):
        with Run.open(tmp_path / "r", config={}) as run:
            rows = run.mapped("answers", {}, Answer, keys, compute, progress=lambda *step: steps.append(step))
            assert rows == [row(number) for number in (4, 0, 3, 1, 2)]
            assert run.mapped("answers", {}, Answer, keys[:2], compute) == rows[:2]
            counters.append(run.counters)
    assert computed == [0, 2, 4]
    assert steps == [(2, 5), (4, 5), (5, 5)]
    assert counters == [{"answers": StageCount(found=2, made=3)}, {"answers": StageCount(found=5, made=0)}]


class Score(Value):
    prompt_id: str
    value: float


def test_rows_may_name_their_prompt_or_have_a_key_of_their_own(run: Run) -> None:
    scores = [Score(prompt_id=f"p:{number}", value=number) for number in range(2)]
    assert run.mapped("scores", {}, Score, ["p:1", "p:0"], lambda _: [scores]) == scores[::-1]
    found = run.mapped("words", {}, str, ["b", "a"], lambda _: [["apple", "bean"]], key=lambda word: word[0])
    assert found == ["bean", "apple"]


def test_a_row_that_was_given_before_is_not_stored_twice(run: Run) -> None:
    run.mapped("answers", {}, Answer, ["p:0"], lambda _: [[row(0)], [row(0)]])
    assert len(run.stage("answers", {}).rows("answers", Answer)) == 1


def test_a_key_without_a_row_is_an_error_and_what_came_is_kept(run: Run) -> None:
    with pytest.raises(ValueError, match="1 of 2 keys got no row; one is 'p:1'"):
        run.mapped("answers", {}, Answer, ["p:0", "p:1"], lambda _: [[row(0)]])
    found = run.mapped("answers", {}, Answer, ["p:0", "p:1"], lambda take: [[] if take(["p:0"]) else [row(1)]])
    assert found == [row(0), row(1)]


# --- results


def test_results_of_another_configuration_are_kept_beside_the_new_ones(tmp_path: Path) -> None:
    folder = tmp_path / "r"

    def save(k: int, command: str = "study", text: str = "") -> None:
        with Run.open(folder, config={"k": k}, command=command) as run:
            assert run.save_result("study.json", text or f"k={k}") == folder / "study.json"

    def kept() -> dict[str, str]:
        return {path.name: path.read_text() for path in folder.glob("study*.json")}

    save(10, text="first")
    save(10)
    assert kept() == {"study.json": "k=10"}
    older = {f"study-{hash_of({'k': 10})[:8]}.json": "k=10"}
    save(20)
    assert kept() == {"study.json": "k=20", **older}
    # Another command's file of that name says nothing of this one's.
    save(30, command="benchmark", text="theirs")
    assert kept() == {"study.json": "theirs", **older}


def test_a_session_may_write_its_result_again(tmp_path: Path) -> None:
    Run.open(tmp_path / "r", config={"k": 1}).close()
    with Run.open(tmp_path / "r", config={"k": 2}) as run:
        run.save_result("study.json", "draft")
        run.save_result("study.json", "final")
    assert {path.name for path in (tmp_path / "r").glob("*.json")} == {"manifest.json", "study.json"}
    assert (tmp_path / "r" / "study.json").read_text() == "final"
    assert read_run(tmp_path / "r").manifest.latest.files == ("study.json",)


# --- torn and bad lines


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_a_torn_last_line_is_dropped_and_cut_off_before_the_next(tmp_path: Path, cut: int) -> None:
    with Run.open(tmp_path / "r", config={}) as run:
        stage = run.stage("generate", {})
        stage.append("rows", row(0))
        stage.append("rows", row(1))
    path = stage.folder / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with Run.open(tmp_path / "r", config={}) as run:
        stage = run.stage("generate", {})
        assert stage.rows("rows", Answer) == [row(0)]
        stage.append("rows", row(1))
        assert stage.rows("rows", Answer) == [row(0), row(1)]


def test_a_bad_line_elsewhere_is_an_error_that_names_it(stage: Stage) -> None:
    for number in range(3):
        stage.append("rows", row(number))
    path = stage.folder / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"prompt": "p' + b"\n" + lines[2])
    with pytest.raises(RunError, match=r"rows\.jsonl, line 2: not a Answer"):
        stage.rows("rows", Answer)
    path.write_bytes(lines[0] + b"\xff\xfe\n")
    with pytest.raises(RunError, match=r"rows\.jsonl, line 2"):
        stage.rows("rows", Answer)


def test_a_finished_stage_with_a_cut_off_line_is_damaged(stage: Stage) -> None:
    stage.append("rows", ROW)
    stage.finish()
    path = stage.folder / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"rows\.jsonl, line 1 is cut off"):
        stage.rows("rows", Answer)


def test_a_failed_append_is_not_glued_to_the_next(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.append("rows", row(0))
    stage.close()
    path = stage.folder / "rows.jsonl"
    real_open = Path.open

    class HalfWriter:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: bytes) -> int:
            return self._file.write(data[: len(data) // 2])

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    def half_open(self: Path, *args: Any, **kwargs: Any) -> Any:
        file = real_open(self, *args, **kwargs)
        return HalfWriter(file) if self == path and args[0] == "ab+" else file

    monkeypatch.setattr(Path, "open", half_open)
    with pytest.raises(RunError, match="only a part of the line"):
        stage.append("rows", row(1))
    monkeypatch.undo()
    stage.append("rows", row(2))
    assert stage.rows("rows", Answer) == [row(0), row(2)]


APPEND_FOREVER = """
    import sys
    from demur.runs import Run
    from demur.types import Answer, Prompt

    def rows(take):
        for number in range(int(sys.argv[2])):
            if take([f"p:{number}"]):
                yield [Answer(prompt=Prompt(id=f"p:{number}", text="?"), text="x" * 5000)]
            if number == 20:
                print("going", flush=True)

    keys = [f"p:{number}" for number in range(min(int(sys.argv[2]), 10000))]
    with Run.open(sys.argv[1], config={"k": 1}) as run:
        run.mapped("generate", {"k": 1}, Answer, keys, rows)
"""


def python(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_process_is_resumed_where_it_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    with python(APPEND_FOREVER, str(folder), "1000000000") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        # While it lives, nobody else may write.
        with pytest.raises(RunError, match=f"is being written by process {process.pid}"):
            Run.open(folder, config={"k": 1})
        process.send_signal(signal.SIGKILL)
        process.wait()
    with Run.open(folder, config={"k": 1}) as run:
        stage = run.stage("generate", {"k": 1})
        assert not stage.done
        survived = len(stage.rows("generate", Answer))
    assert survived > 20
    total = survived + 50
    with python(APPEND_FOREVER, str(folder), str(total)) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    view = read_run(folder)
    (stage,) = view.stages("generate")
    assert stage.done
    rows = stage.load("generate", list[Answer])
    assert [r.prompt.id for r in rows] == [f"p:{number}" for number in range(total)]
    assert [s.finished is None for s in view.manifest.sessions] == [True, False, False]


# --- locks and folders


def test_one_folder_has_one_writer(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", config={}):
        with pytest.raises(RunError, match=f"is being written by process {os.getpid()}"):
            Run.open(tmp_path / "r", config={})
        assert read_run(tmp_path / "r").manifest.latest.finished is None
    with Run.open(tmp_path / "r", config={}):
        pass


def test_a_failed_opening_gives_the_lock_back(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", config={}) as run:
        run.stage("direction", {})
    (tmp_path / "r" / "manifest.json").rename(tmp_path / "away")
    with pytest.raises(RunError, match="but no run"):
        Run.open(tmp_path / "r", config={})
    (tmp_path / "away").rename(tmp_path / "r" / "manifest.json")
    Run.open(tmp_path / "r", config={}).close()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(RunError, match=r"thesis\.tex.*--out"):
        Run.open(tmp_path, config={})


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_place_that_cannot_be_a_folder_is_refused_before_any_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written.*--out"):
        Run.open(tmp_path / place, config={})


def test_a_read_only_folder_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunError, match="cannot be written: Permission denied"):
        Run.open(tmp_path / "r", config={})


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", config={}) as run:
        folder = run.stage("direction", {}).folder
    (folder / ".tmp-direction.safetensors").write_bytes(b"half")
    (tmp_path / "r" / ".tmp-manifest.json").write_text("{")
    with Run.open(tmp_path / "r", config={}) as run:
        run.stage("direction", {})
    assert not list((tmp_path / "r").rglob(".tmp-*"))


def test_no_run_and_a_damaged_manifest_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        read_run(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "sessions": [')
    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        read_run(tmp_path)


def test_a_stage_folder_of_another_key_is_refused(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", config={}) as run:
        about = run.stage("direction", {}).folder / "stage.json"
    content = json.loads(about.read_text())
    about.write_text(json.dumps({**content, "key": "0" * 64}))
    with (
        Run.open(tmp_path / "r", config={}) as run,
        pytest.raises(RunError, match="belongs to another stage"),
    ):
        run.stage("direction", {})


def test_metadata_and_rows_need_no_torch(tmp_path: Path) -> None:
    code = """
        import sys
        import demur.data, demur.judges, demur.runs, demur.stats
        from demur.runs import Run
        with Run.open(sys.argv[1], config={}) as run:
            run.stage("x", {}).finish()
        heavy = ("torch", "transformers", "scipy", "pyarrow", "httpx")
        loaded = [name for name in heavy if name in sys.modules]
        sys.exit(f"imported {loaded}" if loaded else 0)
    """
    with python(code, str(tmp_path / "r")) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
