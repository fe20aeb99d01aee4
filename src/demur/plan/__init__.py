"""What a study will take: download, memory and time, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from demur.errors import DemurError
from demur.method.activations import KEPT_BYTES
from demur.model import (
    CPU_TOKENS,
    ChatFormat,
    answers_fill,
    chosen_dtype,
    find_device,
    fitting_threads,
    read_config,
    tokens_in,
)
from demur.plan.counting import (
    EFFICIENCY,
    Machine,
    ModelSizes,
    PromptLengths,
    Work,
    count_work,
    machine_named,
    measure_machine,
    model_sizes,
)
from demur.report.blocks import Page, Section, Table, Text
from demur.report.format import bytes_text, duration
from demur.saes import Suite

if TYPE_CHECKING:
    from demur.studies.base import Study
    from demur.studies.config import StudyConfig

ASSUMED: Final = PromptLengths(before=5, message=45, after=5)
"""Prompt lengths where prompts or tokenizer are not at hand."""
_FEW_TOKENS: Final = 2048
"""Tokens of a pass that memory is planned for. On a GPU passes grow until they fill half of what is free."""
_COUNTED: Final = 100
"""Prompts of each class whose tokens are counted."""


_SHARED: Final = (
    " Workers take turns at batches, each on a device like the one measured (on a CPU, with cores that one process "
    "leaves unused); what they hold is not counted, and neither is their waiting for one another between the parts of "
    "a study."
)


def plan_study(
    study: Study[Any, Any],
    config: StudyConfig,
    *,
    prompt_tokens: int | None = None,
    workers: int = 1,
    gpu: str | None = None,
) -> Page:
    """Plan a study: sizes from configurations alone, its work by running it on stand-ins, its time by measured speed.

    The prompts that the configuration names need not exist. Gives a page: time in all, sizes, time by stage, and what
    is assumed. Raises DemurError: model or SAEs have no configuration that can be read, or do not fit each other.

    Args:
        study: which one.
        config: its options.
        prompt_tokens: mean tokens of a prompt with its template (default: counted, or assumed).
        workers: processes that share the study.
        gpu: one of `GPUS`, to plan for in place of this machine; each worker then has one.
    """
    from demur.studies.inputs import configured_suite, with_paper_settings

    config = with_paper_settings(config)
    placed = _placed(config)
    hf = read_config(str(placed.model), placed.revision)
    device = torch.device("cuda") if gpu else find_device(config.device)
    dtype = chosen_dtype(hf, config.dtype, device) or torch.float32
    lengths = _prompt_lengths(config, str(placed.model))
    if prompt_tokens is not None:
        lengths = lengths._replace(message=max(3, prompt_tokens - lengths.before - lengths.after))
    model = model_sizes(hf, dtype, sum(lengths))
    suite = configured_suite(placed)
    kind = hf.get_text_config(decoder=True).model_type
    suite.check(d_model=model.d_model, n_layers=model.n_layers, model_type=kind)
    study.check(suite)
    cores = torch.get_num_threads()
    with fitting_threads(device, model.parameters):
        machine = machine_named(gpu, dtype) if gpu else measure_machine(device, dtype)
        at_once = min(workers, cores // torch.get_num_threads()) if device.type == "cpu" else workers
    batch_tokens = config.max_batch_tokens or _batch_tokens(model, machine)
    work = count_work(study, config, model, suite, lengths, batch_tokens)
    times = _times(work, model, machine, at_once)
    together = f" ({times[-1][-1]} with {workers} workers)" if workers > 1 else ""
    memory = _memory(config, model, machine, suite, lengths, batch_tokens, work)
    downloads = {"model": _model_download(placed), "SAEs": _sae_download(suite, model.d_model)}
    known = [size for size in downloads.values() if size is not None]
    download = bytes_text(sum(known) if len(known) == len(downloads) else None)
    place = f"{workers} x {gpu}" if gpu else str(device)
    total = (
        f"About {times[-1][2]}{together} in {str(dtype).removeprefix('torch.')} on {place}, "
        f"{bytes_text(memory['peak'])} of memory, {download} to download."
    )
    assumed = Text(_assumptions(config, machine, lengths, gpu) + (_SHARED if workers > 1 else ""), role="note")
    sections = (
        Section("In all", (Text(total, role="verdict"),), brief=True),
        Section("Sizes", (_sizes(model, suite, downloads, memory),), brief=True),
        Section("Time", (_spent(times, workers), assumed), brief=True),
    )
    return Page(f"demur plan {study.name}: {config.model or 'the bundled model'}", sections)


def _sizes(model: ModelSizes, suite: Suite, downloads: Mapping[str, int | None], memory: Mapping[str, float]) -> Table:
    rows = [
        ("model", f"{model.parameters / 1e6:,.1f} million parameters, {model.n_layers} layers"),
        ("SAEs", f"{len(suite.layers)} layers of {max(spec.d_sae for spec in suite.specs):,} features"),
        *((f"download: {name}", bytes_text(size)) for name, size in downloads.items()),
        *((f"memory: {name}", bytes_text(size)) for name, size in memory.items()),
    ]
    return Table.of("", "what | > size", rows)


def _spent(times: Sequence[tuple[str, ...]], workers: int) -> Table:
    column = f" | > {workers} workers" if workers > 1 else ""
    rows = times if workers > 1 else [row[:3] for row in times]
    return Table.of("", f"stage | > TFLOP | > time{column}", rows, strong=[len(times) - 1])


def _batch_tokens(model: ModelSizes, machine: Machine) -> int:
    """Tokens of a pass: half of what the weights leave free of a GPU, or a fixed number on a CPU."""
    weights = model.parameters * model.value_bytes
    return tokens_in(machine.memory - weights, model.pass_bytes) if machine.memory else CPU_TOKENS


def _times(work: dict[str, Work], model: ModelSizes, machine: Machine, processes: int) -> list[tuple[str, ...]]:
    """For each stage, and in all: operations, time, and time of several processes."""
    numbers = [
        (machine.flops_of(each, model), machine.seconds(each, model), machine.seconds(each, model, processes))
        for each in work.values()
    ]
    flops, alone, shared = zip(*numbers, strict=True)
    rows = zip([*work, "in all"], *([*each, sum(each)] for each in (flops, alone, shared)), strict=True)
    return [(name, f"{each / 1e12:,.2f}", duration(one), duration(several)) for name, each, one, several in rows]


def _assumptions(config: StudyConfig, machine: Machine, lengths: PromptLengths, gpu: str | None) -> str:
    known = f"By the data sheet of the {gpu}" if gpu else "Measured here"
    return (
        f"{known}: {machine.flops / 1e9:,.0f} GFLOP/s in a matrix product, "
        f"{machine.bandwidth / 1e9:,.0f} GB/s in a copy, {1e6 * machine.layer_call:,.0f} µs to call a layer. "
        f"Assumed: prompts of {sum(lengths)} tokens, answers of {config.max_new_tokens}, {EFFICIENCY:.0%} of the "
        "product's speed. Left out: loading, downloading and reading SAE files, judges that are models, capability "
        "tasks. What is in the cache already is not subtracted from the download."
    )


def _memory(
    config: StudyConfig,
    model: ModelSizes,
    machine: Machine,
    suite: Suite,
    lengths: PromptLengths,
    batch_tokens: int,
    work: dict[str, Work],
) -> dict[str, float]:
    """What is held → bytes, for the parts of the method that this study has, and the most at once."""
    row = 4 * model.d_model
    tokens = min(_FEW_TOKENS, batch_tokens)
    weights = model.parameters * model.value_bytes
    fill = answers_fill(model.cache_bytes) if not machine.memory else 1
    # Reading one feature of a TopK dictionary takes the whole encoder.
    encoders = sum(spec.d_sae * row for spec in suite.specs if spec.activation == "topk")
    pool = 2 * getattr(config, "k0", 10) * len(suite.layers) * row + encoders
    done = sum(work.values(), start=Work())
    kept = min(KEPT_BYTES, 2 * config.n.selection * sum(lengths) * len(suite.layers) * row)
    beside = {
        "whole dictionaries": done.dictionary and max(spec.d_sae for spec in suite.specs) * row + kept,
        f"gradients, {tokens} tokens": done.backward_passes and pool + tokens * model.saved_bytes,
        f"answers, {fill * tokens} tokens": done.written
        and pool + tokens * (model.pass_bytes + (fill - 1) * model.cache_bytes),
        "weights in float32, for exact patching": done.conversions and (4 - model.value_bytes) * model.parameters,
    }
    return {
        "Python and libraries": machine.resident,
        "weights": weights,
        "SAE rows of the pool": pool,
        **{name: size for name, size in beside.items() if size},
        "peak": machine.resident + weights + max(pool, *beside.values()),
    }


def _placed(config: StudyConfig) -> StudyConfig:
    """The configuration with the bundled files named where it names no model."""
    if config.model is not None:
        return config
    from demur.bundled import bundled_path

    paths = bundled_path()
    return config.model_copy(update={"model": str(paths.model), "saes": str(paths.saes)})


def _prompt_lengths(config: StudyConfig, source: str) -> PromptLengths:
    """Mean tokens of the configured prompts with their template; `ASSUMED` where prompts or tokenizer are not here."""
    from transformers import AutoTokenizer

    from demur.studies.inputs import read_splits

    auto: Any = AutoTokenizer
    try:
        # Nothing is downloaded for an estimate.
        tokenizer = auto.from_pretrained(source, local_files_only=True)
        chat = ChatFormat(tokenizer, name=source, system_prompt=config.system_prompt)
        frame = chat.tokenize("word")
    except (DemurError, OSError, ValueError, KeyError):
        return ASSUMED
    before, after = frame.regions.index(1), frame.n_post_instruction
    try:
        split = read_splits(config).direction
    except (DemurError, OSError):
        return PromptLengths(before, ASSUMED.message, after)
    prompts = [*split.harmful.head(_COUNTED), *split.harmless.head(_COUNTED)]
    mean = sum(len(chat.tokenize(prompt.text)) for prompt in prompts) / len(prompts)
    return PromptLengths(before, max(3, round(mean) - before - after), after)


def _sae_download(suite: Suite, d_model: int) -> int:
    """Bytes of the SAEs' files: 0 for a folder; published suites hold float32."""
    if Path(suite.source).expanduser().is_dir():
        return 0
    # Encoder, decoder, two biases and thresholds.
    return sum(4 * (2 * spec.d_sae * d_model + 2 * spec.d_sae + d_model) for spec in suite.specs)


def _model_download(config: StudyConfig) -> int | None:
    """Bytes of the model's files on the hub: 0 for a folder, None where the hub does not say."""
    if Path(str(config.model)).expanduser().is_dir():
        return 0
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(str(config.model), revision=config.revision, files_metadata=True)
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError):
        return None
    wanted = (".safetensors", ".json", ".jinja", ".model")
    return sum(file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(wanted))
