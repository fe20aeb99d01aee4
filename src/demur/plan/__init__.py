"""What a study will take: download, memory and time, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from demur.errors import DemurError, ModelError
from demur.model import ChatFormat, fitting_threads
from demur.plan.costs import EFFICIENCY, Machine, ModelSizes, measure_machine, model_sizes, planned_device
from demur.plan.counting import PromptLengths, Work, count_work
from demur.report.blocks import Page, Section, Table, Text
from demur.report.format import bytes_text, duration
from demur.saes import Suite

if TYPE_CHECKING:
    from demur.studies.base import Study
    from demur.studies.config import StudyConfig

ASSUMED: Final = PromptLengths(before=5, message=45, after=5)
"""Prompt lengths where prompts or tokenizer are not at hand."""
_COUNTED: Final = 100
"""Prompts of each class whose tokens are counted."""


@dataclass(frozen=True)
class Stage:
    """A stage of the study: what it does, and what that costs here."""

    name: str
    work: Work
    flops: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a study will take.

    Attributes:
        study: its name.
        title: the model's name.
        place: number format and device.
        model, machine: sizes of the real model, and the speed measured here.
        sae_layers, d_sae: the SAEs.
        lengths: tokens of a prompt, counted or assumed.
        downloads: what is downloaded → bytes; None where the hub does not say.
        memory: what is held → bytes; the last is the most that is held at once.
        stages: in the order in which they end.
    """

    study: str
    title: str
    place: str
    model: ModelSizes
    machine: Machine
    sae_layers: tuple[int, ...]
    d_sae: int
    lengths: PromptLengths
    max_new_tokens: int
    downloads: dict[str, int | None]
    memory: dict[str, float]
    stages: tuple[Stage, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def page(self) -> Page:
        """The plan as a page: time in all, sizes, time by stage, and what is assumed."""
        total = Text(
            f"About {duration(self.seconds)} in {self.place}, {bytes_text(self.memory['peak'])} of memory, "
            f"{bytes_text(_total(self.downloads))} to download.",
            role="verdict",
        )
        sizes = [
            ("model", f"{self.model.parameters / 1e6:,.1f} million parameters, {self.model.n_layers} layers"),
            ("SAEs", f"{len(self.sae_layers)} layers of {self.d_sae:,} features"),
            *((f"download: {name}", bytes_text(size)) for name, size in self.downloads.items()),
            *((f"memory: {name}", bytes_text(size)) for name, size in self.memory.items()),
        ]
        flops = sum(stage.flops for stage in self.stages)
        rows = [(stage.name, f"{stage.flops / 1e12:,.2f}", duration(stage.seconds)) for stage in self.stages]
        rows.append(("in all", f"{flops / 1e12:,.2f}", duration(self.seconds)))
        times = Table.of("", ("stage", "> TFLOP", "> time"), rows, strong=[len(rows) - 1])
        return Page(
            title=f"demur plan {self.study}: {self.title}",
            sections=(
                Section("In all", (total,), brief=True),
                Section("Sizes", (Table.of("", ("what", "> size"), sizes),), brief=True),
                Section("Time", (times, Text(self._assumptions(), role="note")), brief=True),
            ),
        )

    def _assumptions(self) -> str:
        machine, lengths = self.machine, self.lengths
        return (
            f"Measured here: {machine.flops / 1e9:,.0f} GFLOP/s in a matrix product, "
            f"{machine.bandwidth / 1e9:,.0f} GB/s in a copy, {1e6 * machine.layer_call:,.0f} µs to call a layer. "
            f"Assumed: prompts of {sum(lengths)} tokens, answers of {self.max_new_tokens}, {EFFICIENCY:.0%} of the "
            "product's speed. Left out: loading, downloading and reading SAE files, judges that are models, capability "
            "tasks. What is in the cache already is not subtracted from the download."
        )


def plan_study(study: Study[Any, Any], config: StudyConfig, *, prompt_tokens: int | None = None) -> Plan:
    """Plan a study: sizes from configurations alone, its work by running it on stand-ins, its time by measured speed.

    Args:
        study: which one.
        config: its options; the prompts that it names need not exist.
        prompt_tokens: mean tokens of a prompt with its template (default: counted, or assumed).

    Raises:
        DemurError: model or SAEs have no configuration that can be read, or do not fit each other.
    """
    from demur.studies.inputs import with_paper_settings

    config = with_paper_settings(config)
    hf = _hf_config(_source(config), config.revision)
    device = planned_device(config.device)
    stored = str(hf.dtype or "float32").removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, stored if config.dtype == "auto" else config.dtype)
    lengths = prompt_lengths(config)
    if prompt_tokens is not None:
        lengths = lengths._replace(message=max(3, prompt_tokens - lengths.before - lengths.after))
    model = model_sizes(hf, dtype, sum(lengths))
    suite = _suite(config)
    suite.check(d_model=model.d_model, n_layers=model.n_layers)
    d_sae = max(spec.d_sae for spec in suite.specs)
    active = [spec.k for spec in suite.specs if spec.activation == "topk"]
    work = count_work(
        study,
        config,
        n_layers=model.n_layers,
        d_model=model.d_model,
        sae_layers=suite.layers,
        d_sae=d_sae,
        top_k=(active[0] or 1) if active else None,
        lengths=lengths,
    )
    with fitting_threads(device, model.parameters):
        machine = measure_machine(device, dtype)
    return Plan(
        study=study.name,
        title=config.model or "the bundled model",
        place=f"{str(dtype).removeprefix('torch.')} on {device}",
        model=model,
        machine=machine,
        sae_layers=suite.layers,
        d_sae=d_sae,
        lengths=lengths,
        max_new_tokens=config.max_new_tokens,
        downloads={"model": _model_download(config), "SAEs": _sae_download(suite, model.d_model)},
        memory=_memory(config, model, machine, suite),
        stages=tuple(
            Stage(name, each, machine.flops_of(each, model), machine.seconds(each, model))
            for name, each in work.items()
        ),
    )


def _memory(config: StudyConfig, model: ModelSizes, machine: Machine, suite: Suite) -> dict[str, float]:
    """What is held, in bytes. The most is held while a dictionary is looked through, or while gradients are taken."""
    d_sae = max(spec.d_sae for spec in suite.specs)
    row = 4 * model.d_model
    rows = 2 * getattr(config, "k0", 10) * len(suite.layers) * row
    # Reading one feature of a TopK dictionary takes the whole encoder.
    rows += sum(spec.d_sae * row for spec in suite.specs if spec.activation == "topk")
    tokens = config.max_batch_tokens or 2048
    held: dict[str, float] = {
        "Python and libraries": machine.resident,
        "weights": model.parameters * model.value_bytes,
        "SAE rows of the pool": rows,
        "one whole dictionary": d_sae * row,
        f"activations, {tokens} tokens": tokens * model.saved_bytes,
    }
    resident, weights, pool, dictionary, activations = held.values()
    return held | {"peak": resident + weights + max(dictionary, pool + activations)}


def prompt_lengths(config: StudyConfig) -> PromptLengths:
    """Mean tokens of the configured prompts with their template; `ASSUMED` where prompts or tokenizer are not here."""
    from transformers import AutoTokenizer

    from demur.studies.inputs import read_splits

    auto: Any = AutoTokenizer
    try:
        # Nothing is downloaded for an estimate.
        tokenizer = auto.from_pretrained(_source(config), local_files_only=True)
        chat = ChatFormat(tokenizer, name=_source(config), system_prompt=config.system_prompt)
        frame = chat.tokenize("word")
    except (DemurError, OSError, ValueError, KeyError):
        return ASSUMED
    before, after = frame.regions.index(1), frame.n_post_instruction
    try:
        splits = read_splits(config)
    except (DemurError, OSError):
        return PromptLengths(before, ASSUMED.message, after)
    prompts = [*splits.direction.harmful.head(_COUNTED), *splits.direction.harmless.head(_COUNTED)]
    mean = sum(len(chat.tokenize(prompt.text)) for prompt in prompts) / len(prompts)
    return PromptLengths(before, max(3, round(mean) - before - after), after)


def _source(config: StudyConfig) -> str:
    if config.model is not None:
        return config.model
    from demur.bundled import bundled_path

    return str(bundled_path().model)


def _suite(config: StudyConfig) -> Suite:
    if config.model is None:
        from demur.bundled import bundled_path
        from demur.saes import load_suite

        return load_suite(bundled_path().saes, layers=config.layers)
    from demur.studies.inputs import configured_suite

    return configured_suite(config)


def _hf_config(source: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    auto: Any = AutoConfig
    try:
        return auto.from_pretrained(source, **({"revision": revision} if revision else {}))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot read the configuration of {source!r}: {error}\nExpected a folder with config.json, or a "
            "hub id that you can reach (gated models need `hf auth login`)"
        ) from error


def _sae_download(suite: Suite, d_model: int) -> int:
    """Bytes of the SAEs' files: 0 for a folder; published suites hold float32."""
    if Path(suite.source).expanduser().is_dir():
        return 0
    # Encoder, decoder, two biases and thresholds.
    return sum(4 * (2 * spec.d_sae * d_model + 2 * spec.d_sae + d_model) for spec in suite.specs)


def _model_download(config: StudyConfig) -> int | None:
    """Bytes of the model's files on the hub: 0 for a folder, None where the hub does not say."""
    if config.model is None or Path(config.model).expanduser().is_dir():
        return 0
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(config.model, revision=config.revision, files_metadata=True)
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError):
        return None
    wanted = (".safetensors", ".json", ".jinja", ".model")
    return sum(file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(wanted))


def _total(sizes: dict[str, int | None]) -> int | None:
    known = [size for size in sizes.values() if size is not None]
    return sum(known) if len(known) == len(sizes) else None


__all__ = ["ASSUMED", "Plan", "Stage", "plan_study", "prompt_lengths"]
