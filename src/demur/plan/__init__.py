"""What a study will take: download, memory and time, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from demur.errors import DemurError, ModelError
from demur.model import ChatFormat, fitting_threads
from demur.plan.costs import EFFICIENCY, Machine, ModelSizes, Work, measure_machine, model_sizes, planned_device
from demur.plan.counting import PromptLengths, count_work
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
class Plan:
    """What a study will take.

    Attributes:
        study, config: which one, and its options.
        place: number format and device.
        model, machine, suite: sizes of the real model, the speed measured here, and the SAEs, unread.
        lengths: tokens of a prompt, counted or assumed.
        downloads: what is downloaded → bytes; None where the hub does not say.
        work: stage → what it does, in the order in which they end.
    """

    study: str
    config: StudyConfig
    place: str
    model: ModelSizes
    machine: Machine
    suite: Suite
    lengths: PromptLengths
    downloads: dict[str, int | None]
    work: dict[str, Work]

    @property
    def d_sae(self) -> int:
        """Features of the largest SAE."""
        return max(spec.d_sae for spec in self.suite.specs)

    @property
    def memory(self) -> dict[str, float]:
        """What is held → bytes, and the most at once: a dictionary is looked through, or gradients are taken."""
        row = 4 * self.model.d_model
        pool = 2 * getattr(self.config, "k0", 10) * len(self.suite.layers) * row
        # Reading one feature of a TopK dictionary takes the whole encoder.
        pool += sum(spec.d_sae * row for spec in self.suite.specs if spec.activation == "topk")
        tokens = self.config.max_batch_tokens or 2048
        weights, activations = self.model.parameters * self.model.value_bytes, tokens * self.model.saved_bytes
        return {
            "Python and libraries": self.machine.resident,
            "weights": weights,
            "SAE rows of the pool": pool,
            "one whole dictionary": self.d_sae * row,
            f"activations, {tokens} tokens": activations,
            "peak": self.machine.resident + weights + max(self.d_sae * row, pool + activations),
        }

    def page(self) -> Page:
        """The plan as a page: time in all, sizes, time by stage, and what is assumed."""
        costs = [
            (name, self.machine.flops_of(work, self.model), self.machine.seconds(work, self.model))
            for name, work in self.work.items()
        ]
        costs.append(("in all", sum(flops for _, flops, _ in costs), sum(seconds for *_, seconds in costs)))
        memory, known = self.memory, [size for size in self.downloads.values() if size is not None]
        total = Text(
            f"About {duration(costs[-1][-1])} in {self.place}, {bytes_text(memory['peak'])} of memory, "
            f"{bytes_text(sum(known) if len(known) == len(self.downloads) else None)} to download.",
            role="verdict",
        )
        sizes = [
            ("model", f"{self.model.parameters / 1e6:,.1f} million parameters, {self.model.n_layers} layers"),
            ("SAEs", f"{len(self.suite.layers)} layers of {self.d_sae:,} features"),
            *((f"download: {name}", bytes_text(size)) for name, size in self.downloads.items()),
            *((f"memory: {name}", bytes_text(size)) for name, size in memory.items()),
        ]
        rows = [(name, f"{flops / 1e12:,.2f}", duration(seconds)) for name, flops, seconds in costs]
        times = Table.of("", "stage | > TFLOP | > time", rows, strong=[len(rows) - 1])
        sections = (
            Section("In all", (total,), brief=True),
            Section("Sizes", (Table.of("", "what | > size", sizes),), brief=True),
            Section("Time", (times, Text(self._assumptions, role="note")), brief=True),
        )
        return Page(f"demur plan {self.study}: {self.config.model or 'the bundled model'}", sections)

    @property
    def _assumptions(self) -> str:
        machine = self.machine
        return (
            f"Measured here: {machine.flops / 1e9:,.0f} GFLOP/s in a matrix product, "
            f"{machine.bandwidth / 1e9:,.0f} GB/s in a copy, {1e6 * machine.layer_call:,.0f} µs to call a layer. "
            f"Assumed: prompts of {sum(self.lengths)} tokens, answers of {self.config.max_new_tokens}, "
            f"{EFFICIENCY:.0%} of the product's speed. Left out: loading, downloading and reading SAE files, judges "
            "that are models, capability tasks. What is in the cache already is not subtracted from the download."
        )


def plan_study(study: Study[Any, Any], config: StudyConfig, *, prompt_tokens: int | None = None) -> Plan:
    """Plan a study: sizes from configurations alone, its work by running it on stand-ins, its time by measured speed.

    The prompts that the configuration names need not exist. `prompt_tokens` are the mean tokens of a prompt with its
    template (default: counted, or assumed).

    Raises:
        DemurError: model or SAEs have no configuration that can be read, or do not fit each other.
    """
    from demur.studies.inputs import configured_suite, with_paper_settings

    config = with_paper_settings(config)
    placed = _placed(config)
    hf = _hf_config(placed)
    device = planned_device(config.device)
    stored = str(hf.dtype or "float32").removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, stored if config.dtype == "auto" else config.dtype)
    lengths = _prompt_lengths(config, str(placed.model))
    if prompt_tokens is not None:
        lengths = lengths._replace(message=max(3, prompt_tokens - lengths.before - lengths.after))
    model = model_sizes(hf, dtype, sum(lengths))
    suite = configured_suite(placed)
    suite.check(d_model=model.d_model, n_layers=model.n_layers)
    work = count_work(study, config, model, suite, lengths)
    with fitting_threads(device, model.parameters):
        machine = measure_machine(device, dtype)
    place = f"{str(dtype).removeprefix('torch.')} on {device}"
    downloads = {"model": _model_download(placed), "SAEs": _sae_download(suite, model.d_model)}
    return Plan(study.name, config, place, model, machine, suite, lengths, downloads, work)


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


def _hf_config(config: StudyConfig) -> Any:
    from transformers import AutoConfig

    auto: Any = AutoConfig
    try:
        return auto.from_pretrained(config.model, **({"revision": config.revision} if config.revision else {}))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot read the configuration of {config.model!r}: {error}\nExpected a folder with config.json, or a "
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


__all__ = ["ASSUMED", "Plan", "plan_study"]
