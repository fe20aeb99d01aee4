"""Capability under intervention: lm-evaluation-harness's tasks, run on a model that is already loaded.

The harness itself builds the prompts, calls the model and scores the answers; demur only installs the intervention
while it does (`Compiled.everywhere`), for given answers that are scored and for answers that are written. So the
numbers of the clean model are the harness's own.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import io
import json
import logging
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from demur.capability_files import check_data, local_path, task_identity
from demur.capability_rows import CapabilityRow, capability_change
from demur.errors import DemurError, InputError, ModelError
from demur.method.interventions import Compiled
from demur.model import PINNED_DATE, ChatModel, is_out_of_memory

logger = logging.getLogger(__name__)

# Resamples for standard errors of metrics without a formula (F1, perplexity). The harness takes 100,000, for minutes.
_BOOTSTRAP = 1000
_ONE_PROCESS = "DISABLE_MULTIPROC"  # an environment variable of the harness

# What the harness says of the way in which it is called here, of every task, and nothing can be done about.
_EXPECTED = (
    "`pretrained` model kwarg is not of type",
    "Passed an already-initialized model",
    "Overwriting default num_fewshot",
)


class _Loaded(NamedTuple):
    """One task or group, with its data at hand."""

    name: str
    tasks: Any  # the harness's TaskDict


def measure_capability(
    model: ChatModel,
    tasks: Sequence[str | Path],
    intervention: Compiled | None = None,
    *,
    limit: int | None = None,
    seed: int = 1234,
    shots: int | None = None,
    chat_template: bool = False,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CapabilityRow, ...]:
    """Run tasks of lm-evaluation-harness on `model`, with an intervention on every token of every pass.

    Args:
        model: the chat model, used as it is loaded.
        tasks: names that the harness knows (`"gsm8k"`, `"arc_challenge"`, `"mmlu"`), or files and folders in its YAML
            format: a `Path`, or a text that holds a slash or ends in `.yaml`.
        intervention: what is done to the model meanwhile. It must be the same for every text and token.
        limit: documents of each task, from its beginning (None: all).
        seed: of the choice of examples, and of sampling where a task samples (the harness's `--seed`).
        shots: solved examples before each question (None: as each task says).
        chat_template: put prompts, and examples as turns, into the model's chat template.
        batch_size: rows of a pass.
        progress: called with (done, all) after each task or group.

    Returns:
        One row for each task, metric and filter, groups before their tasks, in the order of `tasks`.

    Raises:
        InputError: the extra is not installed, a task is unknown, unreadable or without data, or the intervention acts
            on single prompts or on prompts' tokens only.
        ModelError: the memory does not hold a pass of `batch_size` rows.
    """
    _harness()
    _refuse_unfit(model, intervention, limit, batch_size)
    with _quiet(), _unchanged(model):
        loaded = [one for task in tasks for one in _load(task, model.name)]
        lm = _wrapped(model, batch_size)
    _refuse_repeated(loaded)
    system_prompt = model.chat.system_prompt if chat_template else None
    name = "none" if intervention is None else intervention.id
    rows: list[CapabilityRow] = []
    for done, one in enumerate(loaded, 1):
        edited = nullcontext() if intervention is None else intervention.everywhere()
        with _quiet() as told, _unchanged(model), edited:
            _configure(one, shots, seed)
            rows += _rows(one, _evaluate(lm, one, limit, system_prompt, chat_template), name)
        told.tell(one.name)
        if progress is not None:
            progress(done, len(loaded))
    return tuple(rows)


def _refuse_unfit(model: ChatModel, intervention: Compiled | None, limit: int | None, batch_size: int) -> None:
    if (limit is not None and limit < 1) or batch_size < 1:
        raise InputError(f"a limit of {limit} documents and {batch_size} rows a pass were given; both are 1 or more")
    if intervention is not None:
        if intervention.model is not model:
            raise InputError("the intervention was compiled for another model; compile it for the one that is measured")
        intervention.edits(None)  # refuses what cannot act on every text


def _harness(part: str = "") -> Any:
    """A module of the harness.

    Raises:
        InputError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports
            return import_module(f"lm_eval{part}")
    except ImportError as error:
        raise InputError(
            f"capability is measured with lm-evaluation-harness; install it with: pip install 'demur[eval]' ({error})"
        ) from error


def _wrapped(model: ChatModel, batch_size: int) -> Any:
    """The harness's own wrapper around the loaded model, with a copy of the tokenizer: it changes its padding."""
    return _harness(".models.huggingface").HFLM(
        pretrained=model.hf,
        tokenizer=copy.deepcopy(model.tokenizer),
        backend="causal",
        max_length=model.max_context,
        batch_size=batch_size,
        # As demur renders prompts: no thinking, and a date that does not change by the day.
        enable_thinking=False,
        chat_template_args={"thinking": False, "date_string": PINNED_DATE.strftime("%d %b %Y")},
    )


def _evaluate(lm: Any, one: _Loaded, limit: int | None, system_prompt: str | None, chat_template: bool) -> Any:
    try:
        return _harness(".evaluator").evaluate(
            lm=lm,
            task_dict=one.tasks,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=True,
            system_instruction=system_prompt,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=True,
        )
    except DemurError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelError(
                f"the memory does not hold {lm.batch_size} rows of task {one.name}; lower the batch size"
            ) from error
        if isinstance(error, AssertionError | ValueError):  # how the harness refuses a task's settings
            raise InputError(f"task {one.name} cannot be measured on this model: {error}") from error
        raise


def _configure(one: _Loaded, shots: int | None, seed: int) -> None:
    """Number and choice of examples, and the random state, as `simple_evaluate` of the harness sets them."""
    for task in one.tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if shots is not None and own != 0:
            task.set_config(key="num_fewshot", value=shots)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        elif shots:
            logger.warning("task %s takes no examples, as its file says; %d were asked for", task.task_name, shots)
        task.set_fewshot_seed(seed=seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the global state is what tasks draw from
    torch.manual_seed(seed)


# Finding tasks


def _load(task: str | Path, model: str) -> list[_Loaded]:
    path = local_path(task)
    if path is not None:
        return _load_folder(path) if path.is_dir() else [_load_file(path)]
    name = str(task)
    _refuse_unknown(name)
    # A few tasks ask for the model's name.
    manager = _manager(include_defaults=False, metadata={"pretrained": model})
    manager.task_index.update(_built_in())
    return [_loaded(manager, name, name)]


def check_tasks(tasks: Sequence[str | Path]) -> None:
    """Refuse tasks that `measure_capability` could not find, before anything is computed; nothing is downloaded.

    Of local tasks the YAML is read and the data files that it names are looked for. Tasks of the harness are known
    by name only: whether their data can be had, and the packages that they need, shows when they are loaded.

    Raises:
        InputError: the extra is not installed, a task is unknown, a file is not there or no task.
    """
    if not tasks:
        return
    _harness()
    with _quiet():
        for task in tasks:
            path = local_path(task)
            if path is None:
                _refuse_unknown(str(task))
            else:
                _check_files(path)


def _check_files(path: Path) -> None:
    files = [path]
    if path.is_dir():
        index = _local(path).task_index
        files = [index[name].yaml_path for name in _names_in(path, index)]
    for file in files:
        try:
            check_data(file)
        except (OSError, ValueError) as error:
            raise _unloadable(file.name, error) from error


def _refuse_unknown(task: str) -> None:
    known = _built_in()
    if task not in known:
        near = difflib.get_close_matches(task, sorted(known), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise InputError(
            f"lm-evaluation-harness knows no task {task!r}; {hint}`lm-eval ls tasks` lists them, and a local task is "
            "given as the path of its YAML file"
        )


def _manager(**options: Any) -> Any:
    return _harness(".tasks").TaskManager(**options)


@lru_cache(maxsize=1)
def _built_in() -> Mapping[str, Any]:
    """Name → entry of the harness's own tasks. Reading its 14,000 files takes seconds, so it is done once."""
    return _manager().task_index


def _local(folder: Path) -> Any:
    """The tasks in a folder; where there is a group, which may name tasks of the harness, those as well."""
    manager = _manager(include_path=folder, include_defaults=False)
    if manager.all_groups:
        for name, entry in _built_in().items():
            manager.task_index.setdefault(name, entry)
    return manager


def _load_file(path: Path) -> _Loaded:
    # The harness finds a task by its file, but a group by its name among the files beside it.
    text = path.read_text(encoding="utf-8", errors="replace")
    group = re.search(r"""^[\s{,]*["']?group["']?\s*:""", text, re.MULTILINE)
    manager = _local(path.parent) if group else _manager(include_defaults=False)
    named = [name for name, entry in manager.task_index.items() if entry.yaml_path == path]
    return _loaded(manager, named[0] if named else str(path), path.name)


def _names_in(folder: Path, index: Mapping[str, Any]) -> list[str]:
    found = sorted(name for name, entry in index.items() if entry.yaml_path and folder in entry.yaml_path.parents)
    if not found:
        raise InputError(f"{folder} holds no task: expected YAML files that name a `task` or a `group`")
    return found


def _load_folder(folder: Path) -> list[_Loaded]:
    manager = _local(folder)
    found = _names_in(folder, manager.task_index)
    groups = [_loaded(manager, name, name) for name in found if name in manager.all_groups]
    members = {task for one in groups for task in one.tasks["tasks"]}
    members |= {group for one in groups for group in one.tasks["groups"] if group != one.name}
    alone = [name for name in found if name not in manager.all_groups and name not in members]
    return [one for one in groups if one.name not in members] + [_loaded(manager, name, name) for name in alone]


def _loaded(manager: Any, spec: str, name: str) -> _Loaded:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's loading scripts
            return _Loaded(name, manager.load([spec]))
    except ImportError as error:
        raise InputError(
            f"task {name} needs a package that is not installed: {error}. Many come with an extra of the harness, such "
            "as `pip install 'lm-eval[math]'`"
        ) from error
    except Exception as error:  # whatever the harness, the data's format or the network raise
        raise _unloadable(name, error) from error


def _unloadable(name: str, error: Exception) -> InputError:
    lines = str(error).strip().splitlines()
    return InputError(
        f"task {name} cannot be loaded: {type(error).__name__}: {lines[0] if lines else 'no reason given'}\n"
        "Data that must be downloaded needs a network (and HF_HUB_OFFLINE unset); gated data needs its terms "
        "accepted and `hf auth login`. Without them write a local task: a YAML file that reads your own copy of "
        "the data (docs/capability.md), given by its path"
    )


def _refuse_repeated(loaded: Sequence[_Loaded]) -> None:
    counts = Counter(name for one in loaded for name in one.tasks["tasks"])
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise InputError(f"task {repeated[0]} is asked for twice, by itself or as part of a group; name it once")


# Reading results


def _rows(one: _Loaded, results: Mapping[str, Any], intervention: str) -> Iterator[CapabilityRow]:
    groups: Mapping[str, Any] = one.tasks.get("groups") or {}
    digests = {name: _digest(results, name) for name in one.tasks["tasks"]}
    for name, group in groups.items():
        parts = sorted(digests[task.task_name] for task in group.get_all_tasks())
        digests[name] = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    for name in (*groups, *one.tasks["tasks"]):
        found = results["results"].get(name, {})
        better = results["higher_is_better"].get(name) or {}
        for key, value in found.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            scored = [s for s in results["samples"].get(name, ()) if s["filter"] == kind and metric in s["metrics"]]
            stderr = found.get(f"{metric}_stderr,{kind}")
            yield CapabilityRow(
                task=name,
                group=name in groups,
                metric=metric,
                filter=kind,
                value=float(value),
                stderr=float(stderr) if _is_number(stderr) else None,
                n=len(scored) if name not in groups else int(found.get("sample_count", {}).get(key, 0)),
                shots=int(results["n-shot"].get(name) or 0),
                higher_is_better=better.get(metric),
                version=str(results["versions"].get(name)),
                harness=str(_harness().__version__),
                digest=digests[name],
                intervention=intervention,
                scores=_scores(one, name, metric, [each[metric] for each in scored]),
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _scores(one: _Loaded, name: str, metric: str, values: Sequence[object]) -> tuple[float, ...]:
    """Each document's score, where the row's value is their mean."""
    mean = _harness(".api.metrics").mean
    task = one.tasks["tasks"].get(name)
    plain = task is not None and task.aggregation().get(metric, mean) is mean
    if not plain or not all(isinstance(value, int | float | np.number) for value in values):
        return ()
    return tuple(float(cast("float", value)) for value in values)


def _digest(results: Mapping[str, Any], name: str) -> str:
    """Hash of what was asked and how it was scored; paths and what the model said are not in it."""
    config = results["configs"][name]
    scoring = [config.get(key) for key in ("output_type", "repeats", "filter_list", "metric_list", "process_results")]
    samples = results["samples"][name]
    asked = [[s["doc_hash"], s["target_hash"], s["arguments"]] for s in samples if s["filter"] == samples[0]["filter"]]
    text = json.dumps([scoring, asked], default=_named, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _named(value: object) -> str:
    """Functions and classes by name: what they print holds an address."""
    return str(getattr(value, "__qualname__", None) or value)


# What the harness would change or say


class _Told(logging.Handler):
    """Warnings of the harness, gathered to be told once a task instead of once a document."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: dict[tuple[str, int], list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if not text.startswith(_EXPECTED):
            self._records.setdefault((record.pathname, record.lineno), []).append(text)

    def tell(self, task: str) -> None:
        for texts in self._records.values():
            more = f" (and {len(texts) - 1} more of the kind)" if len(texts) > 1 else ""
            logger.warning("lm-evaluation-harness says of %s: %s%s", task, texts[0][:300], more)
        self._records.clear()


@contextmanager
def _quiet() -> Iterator[_Told]:
    """No progress bars, no prints and no log lines of the harness; its warnings are gathered."""
    told = _Told()
    log = logging.getLogger("lm_eval")
    before = log.level, log.propagate
    log.addHandler(told)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        with _no_bars(), _no_forks(), redirect_stdout(io.StringIO()):
            yield told
    finally:
        log.removeHandler(told)
        log.setLevel(before[0])
        log.propagate = before[1]


@contextmanager
def _no_bars() -> Iterator[None]:
    """The harness hands `disable=False` to its progress bars, so no setting reaches them."""
    bar: Any = import_module("tqdm").tqdm
    begin = bar.__init__

    def unseen(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **{**kwargs, "disable": True})

    bar.__init__ = unseen
    try:
        yield
    finally:
        bar.__init__ = begin


@contextmanager
def _no_forks() -> Iterator[None]:
    """The harness would bootstrap in forks of this process, which holds a model and its threads."""
    before = os.environ.get(_ONE_PROCESS)
    os.environ[_ONE_PROCESS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONE_PROCESS]
        else:
            os.environ[_ONE_PROCESS] = before


@contextmanager
def _unchanged(model: ChatModel) -> Iterator[None]:
    """Put back the random states that the harness seeds, and the model's kind of cache.

    A static cache brings masks from which padding cannot be read; the kind of cache changes no answer.
    """
    settings = cast("Any", model.hf).generation_config
    cache, settings.cache_implementation = settings.cache_implementation, None
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        settings.cache_implementation = cache


__all__ = ["CapabilityRow", "capability_change", "check_tasks", "measure_capability", "task_identity"]
