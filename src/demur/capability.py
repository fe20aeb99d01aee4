"""Capability under intervention: tasks of lm-evaluation-harness, run on a model that is already loaded. The harness
does all but intervene: the clean model's numbers are its own. Importing this module imports neither torch nor it."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import math
import os
import random
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from demur._task_files import check_data, is_group, local_path, task_identity
from demur.errors import DemurError, InputError, ModelError, nearest
from demur.stats import Z_95, Estimate
from demur.types import Value

if TYPE_CHECKING:
    from demur.method.interventions import Compiled
    from demur.model import ChatModel

logger = logging.getLogger(__name__)

_BOOTSTRAP = 1000
"""Resamples for standard errors of metrics without a formula (F1, perplexity). The harness's 100,000 take minutes."""
_ONE_PROCESS = "DISABLE_MULTIPROC"
"""Environment variable of the harness: no bootstrap in forks of a process that holds a model and its threads."""
_EXPECTED = ("`pretrained` model kwarg is not of type", "Passed an already-initialized model")
"""Warnings of the harness that the calls here always trigger."""


class CapabilityRow(Value):
    """One number of lm-evaluation-harness, in the metric's unit (a fraction for accuracies), and what it was measured
    on. `task`, `metric`, `filter`, `version` (`gsm8k`, `exact_match`, `strict-match`, 3) and `stderr` are its own."""

    task: str
    group: bool = False
    """The row sums up several tasks (`mmlu`), each of which has rows of its own."""
    metric: str
    filter: str = "none"
    value: float
    stderr: float | None
    n: int
    """Documents."""
    shots: int
    """Solved examples before each question."""
    higher_is_better: bool | None
    version: str
    harness: str
    """Version of lm-evaluation-harness."""
    digest: str
    """Hash of the requests as the model got them (examples and template included), the targets and the scoring. Rows
    with one digest answer the same questions."""
    intervention: str
    """Id of what was done to the model (`"none"`: nothing)."""
    scores: tuple[float, ...] = ()
    """Each document's score, in order, where the value is their mean; empty for other metrics and for groups."""


def capability_change(before: CapabilityRow, after: CapabilityRow) -> Estimate:
    """Mean of `after − before` over documents, paired, with a 95 % interval (normal, from the differences' spread),
    mostly much narrower than the rows' standard errors suggest. Raises InputError: the rows are of different tasks,
    metrics, filters or questions, or hold no scores per document."""
    names = [f"{row.task} {row.metric} ({row.filter})" for row in (before, after)]
    if names[0] != names[1]:
        raise InputError(f"{names[0]} cannot be compared with {names[1]}; give two rows of one task, metric and filter")
    if before.digest != after.digest:
        differ = f"the two rows of {names[0]} were measured on different questions or prompts"
        raise InputError(f"{differ}; measure both with the same limit, seed, number of examples and chat template")
    if not before.scores or len(before.scores) != len(after.scores):
        raise InputError(f"{names[0]} has no score for each document, so its change cannot be paired")
    changes = [y - x for x, y in zip(before.scores, after.scores, strict=True)]
    mean, n = statistics.fmean(changes), len(changes)
    half = Z_95 * statistics.stdev(changes) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(value=mean, low=mean - half, high=mean + half, n=n)


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
    """Run tasks of lm-evaluation-harness on `model`, with an intervention on every token of every pass. Raises
    InputError: the extra is not installed, a task is unknown, unreadable or without data, or the intervention acts on
    single prompts or on prompts' tokens only; ModelError: the memory does not hold a pass of `batch_size` rows.

    Args:
        model: the chat model, used as it is loaded.
        tasks: names that the harness knows (`"gsm8k"`, `"mmlu"`), or files and folders in its YAML format: a `Path`, or
            a text that holds a slash or ends in `.yaml`.
        intervention: what is done to the model meanwhile. It must be the same for every text and token.
        limit: documents of each task, from its beginning (None: all).
        seed: of the choice of examples, and of sampling where a task samples (the harness's `--seed`).
        shots: solved examples before each question (None: as each task says).
        chat_template: put prompts, and examples as turns, into the model's chat template.
        batch_size: rows of a pass.
        progress: called with (done, all) after each task or group.

    Returns:
        One row for each task, metric and filter, groups before their tasks, in the order of `tasks`.
    """
    _harness()
    if (limit is not None and limit < 1) or batch_size < 1:
        raise InputError(f"a limit of {limit} documents and {batch_size} rows a pass were given; both are 1 or more")
    if intervention is not None:
        if intervention.model is not model:
            raise InputError("the intervention was compiled for another model; compile it for the one that is measured")
        intervention.edits(None)  # refuses what cannot act on every text
    with _contained(model):
        loaded = [one for task in tasks for one in _load(task, model.name)]
        lm = _wrapped(model, batch_size)
    _check_loaded(loaded, shots)
    asked = {"limit": limit, "bootstrap_iters": _BOOTSTRAP, "log_samples": True, "apply_chat_template": chat_template}
    asked |= {"system_instruction": model.chat.system_prompt if chat_template else None, "fewshot_as_multiturn": True}
    name = "none" if intervention is None else intervention.id
    rows: list[CapabilityRow] = []
    for done, one in enumerate(loaded, 1):
        edited = nullcontext() if intervention is None else intervention.everywhere()
        with _contained(model) as harness_warnings, edited:
            _configure(one, shots, seed)
            rows += _rows(one, _evaluate(lm, one, asked), name)
        harness_warnings.pass_on(one.name)
        if progress is not None:
            progress(done, len(loaded))
    return tuple(rows)


def check_tasks(tasks: Sequence[str | Path]) -> None:
    """Refuse tasks that `measure_capability` could not find; nothing is downloaded. Of local tasks the YAML is read and
    the data files that it names are looked for; the harness's own are known by name only. Raises InputError: the extra
    is not installed, a task is unknown, a file is not there or no task."""
    if tasks:
        _harness()
    for task in tasks:
        manager, names, path = _find(task)
        files = [manager.task_index[name].yaml_path for name in names] if path and path.is_dir() else [path]
        for file in filter(None, files):
            try:
                check_data(file)
            except (OSError, ValueError) as error:
                raise _unloadable(file.name, error) from error


def _harness(part: str = "") -> Any:
    """A module of the harness, or an error that says how to install it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports
            return import_module(f"lm_eval{part}")
    except ImportError as error:
        way = "install it with: pip install 'demur[eval]'"
        raise InputError(f"capability is measured with lm-evaluation-harness; {way} ({error})") from error


def _wrapped(model: ChatModel, batch_size: int) -> Any:
    """The harness's own wrapper around the loaded model, with a copy of the tokenizer, whose padding it changes."""
    from demur.model import PINNED_DATE

    # As demur fills the template: no thinking, and a date that does not change by the day.
    template = {"thinking": False, "date_string": PINNED_DATE.strftime("%d %b %Y")}
    asked = {"backend": "causal", "max_length": model.max_context, "batch_size": batch_size, "enable_thinking": False}
    tokenizer = copy.deepcopy(model.tokenizer)
    hflm = _harness(".models.huggingface").HFLM
    return hflm(pretrained=model.hf, tokenizer=tokenizer, chat_template_args=template, **asked)


class _Loaded(NamedTuple):
    """One task or group with its data, as the harness's TaskDict."""

    name: str
    tasks: Any


def _check_loaded(loaded: Sequence[_Loaded], shots: int | None) -> None:
    found = [named for one in loaded for named in one.tasks["tasks"].items()]
    for name, count in Counter(name for name, _ in found).items():
        if count > 1:
            raise InputError(f"task {name} is asked for twice, by itself or as part of a group; name it once")
    for name, task in found:
        if shots and task.get_config("num_fewshot") == 0:
            logger.warning("task %s takes no examples, as its file says; %d were asked for", name, shots)


def _configure(one: _Loaded, shots: int | None, seed: int) -> None:
    """Set number and choice of examples, and the random state, as `simple_evaluate` of the harness does."""
    from transformers import set_seed

    for task in one.tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:
            task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
        task.set_fewshot_seed(seed=seed)
    set_seed(seed)  # Of Python, numpy and torch: tasks draw from the global states.


def _evaluate(lm: Any, one: _Loaded, asked: Mapping[str, Any]) -> Any:
    from demur.model import is_out_of_memory

    try:
        return _harness(".evaluator").evaluate(lm=lm, task_dict=one.tasks, **asked)
    except Exception as error:
        if is_out_of_memory(error):
            held = f"the memory does not hold {lm.batch_size} rows of task {one.name}"
            raise ModelError(f"{held}; lower the batch size") from error
        if isinstance(error, AssertionError | ValueError) and not isinstance(error, DemurError):
            raise InputError(f"task {one.name} cannot be measured on this model: {error}") from error
        raise


def _rows(one: _Loaded, results: Mapping[str, Any], intervention: str) -> Iterator[CapabilityRow]:
    groups: Mapping[str, Any] = one.tasks.get("groups") or {}
    digests = {name: _digest(results, name) for name in one.tasks["tasks"]}
    for name, group in groups.items():
        parts = sorted(digests[task.task_name] for task in group.get_all_tasks())
        digests[name] = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    for name in (*groups, *one.tasks["tasks"]):
        found = results["results"].get(name, {})
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
                higher_is_better=(results["higher_is_better"].get(name) or {}).get(metric),
                version=str(results["versions"].get(name)),
                harness=str(_harness().__version__),
                digest=digests[name],
                intervention=intervention,
                scores=_scores(one.tasks["tasks"].get(name), metric, [each[metric] for each in scored]),
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _scores(task: Any, metric: str, values: Sequence[Any]) -> tuple[float, ...]:
    """Each document's score, where the row's value is their mean."""
    mean = _harness(".api.metrics").mean
    averaged = task is not None and task.aggregation().get(metric, mean) is mean
    numeric = all(isinstance(value, int | float | np.number) for value in values)
    return tuple(map(float, values)) if averaged and numeric else ()


def _digest(results: Mapping[str, Any], name: str) -> str:
    """Hash of what was asked and how it was scored, without paths and without the model's answers."""
    config, samples = results["configs"][name], results["samples"][name]
    scoring = [config.get(key) for key in ("output_type", "repeats", "filter_list", "metric_list", "process_results")]
    asked = [[s["doc_hash"], s["target_hash"], s["arguments"]] for s in samples if s["filter"] == samples[0]["filter"]]

    def named(it: object) -> str:  # Functions and classes print an address.
        return getattr(it, "__qualname__", str(it))

    text = json.dumps([scoring, asked], default=named, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _built_in() -> Mapping[str, Any]:
    """Name → entry of the harness's own tasks. Reading its 14,000 files takes seconds."""
    return _harness(".tasks").TaskManager().task_index


def _find(task: str | Path, model: str | None = None) -> tuple[Any, list[str], Path | None]:
    """A manager that knows a task, or the tasks of a file or folder; their names; and the path of local ones. A few
    tasks ask for the name of the model."""
    path = local_path(task)
    # The harness finds a task by its file alone, but a group by its name among the files beside it.
    folder = path if path is None or path.is_dir() else path.parent if is_group(path) else None
    options = {"include_path": folder, "include_defaults": False, "metadata": model and {"pretrained": model}}
    manager = _harness(".tasks").TaskManager(**options)
    places = {name: entry.yaml_path for name, entry in manager.task_index.items() if entry.yaml_path}
    if path is None:
        if task not in _built_in():
            raise InputError(
                f"lm-evaluation-harness knows no task {task!r}{nearest(str(task), _built_in())}; `lm-eval ls tasks` "
                "lists them, and a local task is given as the path of its YAML file"
            )
        names = [str(task)]
    else:
        names = sorted(name for name, place in places.items() if path == place or path in place.parents)
        if not names and path.is_dir():
            raise InputError(f"{path} holds no task: expected YAML files that name a `task` or a `group`")
    if path is None or manager.all_groups:  # which may name tasks of the harness
        manager.task_index.update({**_built_in(), **manager.task_index})
    return manager, names or [str(path)], path


def _load(task: str | Path, model: str) -> list[_Loaded]:
    """A task, or the groups of a folder and those of its tasks that are in none of them."""
    manager, names, path = _find(task, model)
    if path is None or path.is_file():
        return [_loaded(manager, names[0], path.name if path else "")]
    groups = [_loaded(manager, name) for name in names if name in manager.all_groups]
    inside = {name for one in groups for name in (*one.tasks["tasks"], *one.tasks["groups"]) if name != one.name}
    alone = [name for name in names if name not in manager.all_groups and name not in inside]
    return [one for one in groups if one.name not in inside] + [_loaded(manager, name) for name in alone]


def _loaded(manager: Any, spec: str, name: str = "") -> _Loaded:
    name = name or spec
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


class _Warnings(logging.Handler):
    """Collects the harness's warnings, which it gives once a document."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: dict[tuple[str, int], list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if not text.startswith(_EXPECTED):
            self._texts.setdefault((record.pathname, record.lineno), []).append(text)

    def pass_on(self, task: str) -> None:
        """Log each kind of warning once."""
        for texts in self._texts.values():
            more = f" (and {len(texts) - 1} more like it)" if len(texts) > 1 else ""
            logger.warning("lm-evaluation-harness on %s: %s%s", task, texts[0][:300], more)


@contextmanager
def _contained(model: ChatModel) -> Iterator[_Warnings]:
    """Hold back what the harness prints, its progress bars and its log lines; its warnings are collected. What it
    changes is put back: random states, the environment, and the model's kind of cache."""
    import torch

    found, log, settings = _Warnings(), logging.getLogger("lm_eval"), cast("Any", model.hf.generation_config)
    with ExitStack() as after:
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002
        after.enter_context(torch.random.fork_rng([model.device] if model.device.type == "cuda" else []))
        before = os.environ.get(_ONE_PROCESS)
        after.callback(os.environ.update, {} if before is None else {_ONE_PROCESS: before})
        after.callback(os.environ.pop, _ONE_PROCESS)
        os.environ[_ONE_PROCESS] = "1"
        after.callback(setattr, settings, "cache_implementation", settings.cache_implementation)
        settings.cache_implementation = None  # A static one hides the padding.
        after.callback(setattr, log, "propagate", log.propagate)
        log.propagate = False
        after.callback(log.setLevel, log.level)
        log.setLevel(logging.WARNING)
        after.callback(log.removeHandler, found)
        log.addHandler(found)
        # Its progress bars are given `disable=False`, so no setting reaches them.
        after.enter_context(redirect_stdout(io.StringIO()))
        after.enter_context(redirect_stderr(io.StringIO()))
        yield found


__all__ = ["CapabilityRow", "capability_change", "check_tasks", "measure_capability", "task_identity"]
