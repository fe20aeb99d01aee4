"""`demur plan`: what a study will take, before anything heavy is loaded or downloaded."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from demur.cli import _console
from demur.cli._options import benchmark_config, make_config, study_config, takes_options
from demur.errors import DemurError, InputError, ModelError
from demur.studies.benchmark.config import BenchmarkConfig
from demur.studies.config import StudyConfig

if TYPE_CHECKING:
    import torch

    from demur.plan import Machine, ModelShape, SaeShape, StageCost, Workload

_ANY = ({"source": "any"},)
_PROMPT_TOKENS = 60
_COUNTED = 100
"""Prompts of each source that are counted."""
_FIELDS = {"harm_judge": "judges", "task": "tasks", "budgets": "damage_budgets", "curve": "sizes"}
"""Options of the benchmark that fill a field of another name."""


@takes_options(study_config, benchmark_config)
def plan(
    options: dict[str, object],
    benchmark: Annotated[bool, typer.Option("--benchmark", help="Plan `demur benchmark` instead of `study`.")] = False,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Mean tokens of a prompt with its template (default: counted where prompts and tokenizer are at hand, "
            f"else {_PROMPT_TOKENS}).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Estimate download, memory and time of a study from configurations alone. Prompts need not be named."""
    given = dict(options)
    _refuse_own(given, benchmark)
    named = given["model"] is not None and given["harmful"] and given["harmless"]
    if given["model"] is not None:
        given |= {name: given[name] or _ANY for name in ("harmful", "harmless")}
    config = make_config(given, BenchmarkConfig if benchmark else StudyConfig)
    from demur.model import fitting_threads
    from demur.plan import BYTES, Workload
    from demur.studies._inputs import with_paper_settings

    extras = _extras(config)
    bundled = config.model is None
    config = _bundled(config) if bundled else with_paper_settings(config)
    if prompt_tokens is None:
        prompt_tokens = mean_prompt_tokens(config, bundled=bundled) if bundled or named else _PROMPT_TOKENS
    hf = _hf_config(config)
    shape = model_shape(hf)
    suite, sae_download = _saes(config, shape)
    device = _device(config.device)
    dtype = str(hf.dtype or "float32").removeprefix("torch.") if config.dtype == "auto" else config.dtype
    work = Workload(
        config=config,
        model=shape,
        saes=suite,
        value_bytes=BYTES.get(dtype, 4),
        prompt_tokens=prompt_tokens,
        batch_tokens=config.max_batch_tokens or 2048,
    )
    with fitting_threads(device, shape.parameters):
        machine = measure_machine(device, dtype)
    _print(work, machine, _costs(work, machine, extras), f"{dtype} on {device}", _model_download(config), sae_download)


def _refuse_own(given: dict[str, object], benchmark: bool) -> None:
    """Options of the benchmark are dropped where it is not planned, and refused if they were given."""
    for name in inspect.signature(benchmark_config).parameters:
        field = _FIELDS.get(name, name)
        if field.endswith("_column"):
            continue  # Part of its files' option.
        if not benchmark and given.pop(field, None) is not None:
            raise InputError(f"--{name.replace('_', '-')} is an option of the benchmark; add --benchmark")


def _extras(config: StudyConfig) -> tuple[int, int]:
    """Prompts that only look harmful, and plain texts, that a benchmark measures on."""
    if not isinstance(config, BenchmarkConfig):
        return 0, 0
    bundled = config.model is None
    return (
        config.n_over_refusal if bundled or config.over_refusal else 0,
        config.n_text if bundled or config.text else 0,
    )


def _costs(work: Workload, machine: Machine, extras: tuple[int, int]) -> tuple[StageCost, ...]:
    from demur.plan import benchmark_stages, stages

    if isinstance(work.config, BenchmarkConfig):
        return benchmark_stages(work, machine, over_refusal=extras[0], texts=extras[1])
    return stages(work, machine)


def mean_prompt_tokens(config: StudyConfig, *, bundled: bool) -> int:
    """Mean length of the prompts with their template, of the first of each source; a guess where either is not at
    hand."""
    from transformers import AutoTokenizer

    from demur.model import ChatFormat

    try:
        auto: Any = AutoTokenizer
        # Nothing is downloaded for an estimate.
        tokenizer = auto.from_pretrained(str(config.model), local_files_only=True)
        chat = ChatFormat(tokenizer, name=str(config.model), system_prompt=config.system_prompt)
        lengths = [len(chat.tokenize(text)) for text in _some_prompts(config, bundled)]
    except (DemurError, OSError, ValueError, KeyError):
        return _PROMPT_TOKENS
    return round(sum(lengths) / len(lengths)) if lengths else _PROMPT_TOKENS


def _some_prompts(config: StudyConfig, bundled: bool) -> list[str]:
    if bundled:
        from demur.bundled import bundled_prompts

        sets = bundled_prompts()
        return [prompt.text for each in (sets.harmful, sets.harmless) for prompt in each.head(_COUNTED)]
    from demur.data import cache_path, find_set, read_prompts

    texts: list[str] = []
    for source in (*config.harmful, *config.harmless, *config.test_harmful, *config.test_harmless):
        found = find_set(source.source)
        if found is None or cache_path(found).is_file():
            read = read_prompts(source.source, label="harmful", column=source.column)
            texts += [prompt.text for prompt in read.head(_COUNTED)]
    return texts


def _bundled(config: StudyConfig) -> StudyConfig:
    """The configuration with the bundled model and its SAEs named."""
    from demur.bundled import bundled_path

    place = bundled_path()
    return config.model_copy(update={"model": str(place.model), "saes": str(place.saes)})


def _hf_config(config: StudyConfig) -> Any:
    from transformers import AutoConfig

    auto: Any = AutoConfig
    name = str(config.model)
    try:
        return auto.from_pretrained(name, **({"revision": config.revision} if config.revision else {}))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot read the configuration of {name!r}: {error}\nExpected a folder with config.json, or a "
            "hub id that you can reach (gated models need `hf auth login`)"
        ) from error


def model_shape(hf: Any) -> ModelShape:
    """Sizes of the text decoder, counted on a model without weights. Experts count as if all of them ran."""
    import torch
    from transformers import AutoModelForCausalLM

    from demur.model import find_layers
    from demur.plan import ModelShape

    text = hf.get_text_config(decoder=True)
    auto: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            empty: torch.nn.Module = auto.from_config(text)
    except (ValueError, KeyError) as error:
        raise ModelError(f"{text.model_type!r} is not a causal language model that can be planned: {error}") from error
    heads = int(text.num_attention_heads)
    head_size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    layers = find_layers(empty, int(text.num_hidden_layers))
    return ModelShape(
        n_layers=len(layers),
        d_model=int(text.hidden_size),
        vocab=int(text.vocab_size),
        parameters=sum(parameter.numel() for parameter in empty.parameters()),
        block_weights=sum(p.numel() for p in layers.parameters() if p.ndim >= 2),
        attention_width=heads * head_size,
        kv_width=int(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        d_ff=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
    )


def _saes(config: StudyConfig, shape: ModelShape) -> tuple[SaeShape, int]:
    """The SAEs that the study would use, and the bytes that it would download (0 for a folder)."""
    from demur.plan import SaeShape
    from demur.studies._inputs import configured_suite

    suite = configured_suite(config)
    suite.check(d_model=shape.d_model, n_layers=shape.n_layers)
    sizes = [spec.d_sae for spec in suite.specs]
    local = Path(suite.source).expanduser().is_dir()
    found = SaeShape(
        layers=suite.layers,
        d_sae=max(sizes),
        whole_encoder=any(spec.activation == "topk" for spec in suite.specs),
    )
    # Published suites hold float32: encoder, decoder, two biases and thresholds.
    return found, 0 if local else sum(4 * (2 * size * shape.d_model + 2 * size + shape.d_model) for size in sizes)


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


def _device(name: str) -> torch.device:
    import torch

    if name in ("auto", "balanced", "balanced_low_0", "sequential"):
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device {name!r} cannot be used here ({reason}); expected auto, cpu, cuda, cuda:N, mps or balanced"
        ) from None


def measure_machine(device: torch.device, dtype: str) -> Machine:
    """Speed of a large matrix product and of a copy, best of several, in well under a second."""
    import torch

    from demur.plan import Machine

    side, values = (8192, 1 << 27) if device.type == "cuda" else (1024, 1 << 24)
    a = torch.ones(side, side, device=device, dtype=getattr(torch, dtype))
    source = torch.ones(values, device=device)
    target = torch.empty_like(source)
    product = _best_seconds(lambda: a @ a, device)
    copy = _best_seconds(lambda: target.copy_(source), device)
    # A copy reads and writes every byte.
    return Machine(
        flops=2 * side**3 / product,
        bandwidth=2 * 4 * values / copy,
        layer_call=_layer_call(device),
        resident=resident_bytes() if device.type == "cpu" else 0,
    )


def _layer_call(device: torch.device, layers: int = 4, steps: int = 12) -> float:
    """Seconds of one call of a decoder layer that has nothing to do: a tiny model writes a few tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config: Any = LlamaConfig(vocab_size=64, num_hidden_layers=layers, max_position_embeddings=64, **sizes)
    model: Any = LlamaForCausalLM(config).to(device).eval()  # pyright: ignore[reportArgumentType]
    ids = torch.ones(1, 4, dtype=torch.long, device=device)
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    # `generate` does the work of inference mode itself, but not for the mask's tensors.
    with torch.inference_mode():
        seconds = _best_seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options), device)
    return seconds / (layers * steps)


def resident_bytes() -> int:
    """What this process holds in memory now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _best_seconds(work: Any, device: torch.device, repeats: int = 4) -> float:
    import torch

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    best = float("inf")
    for _ in range(repeats):
        finish()
        start = time.perf_counter()
        work()
        finish()
        best = min(best, time.perf_counter() - start)
    return best


def size_text(number: float | None) -> str:
    """Bytes in the decimal unit that fits."""
    if number is None:
        return "unknown: the hub cannot be reached"
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= step:
            return f"{number / step:.1f} {unit}"
    return f"{number:.0f} bytes"


def _print(
    work: Workload,
    machine: Machine,
    costs: Sequence[StageCost],
    where: str,
    model_bytes: int | None,
    sae_bytes: int,
) -> None:
    from rich.table import Table

    from demur.cli._tables import plain_table
    from demur.plan import memory
    from demur.report import duration

    held = memory(work, machine)
    sizes = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in (
        ("model", f"{work.model.parameters / 1e6:,.1f} million parameters, {work.model.n_layers} layers"),
        ("SAEs", f"{len(work.saes.layers)} layers of {work.saes.d_sae:,} features"),
        ("runs in", where),
        ("download: model", size_text(model_bytes)),
        ("download: SAEs", size_text(sae_bytes)),
        ("memory: Python and libraries", size_text(held.resident)),
        ("memory: weights", size_text(held.weights)),
        ("memory: SAE rows of the pool", size_text(held.rows)),
        ("memory: one whole dictionary", size_text(held.dictionary)),
        (f"memory: activations, {work.batch_tokens} tokens", size_text(held.activations)),
        ("memory: peak", size_text(held.peak)),
    ):
        sizes.add_row(name, text)
    times = plain_table("Time, estimated", "stage", "TFLOP", "time", numbers=2)
    for cost in costs:
        times.add_row(cost.name, f"{cost.flops / 1e12:,.2f}", duration(cost.seconds))
    total = sum(cost.seconds for cost in costs)
    times.add_row("in all", f"{sum(cost.flops for cost in costs) / 1e12:,.2f}", duration(total), style="bold")
    console = _console.out()
    console.print(sizes)
    console.print()
    console.print(times)
    _console.say(
        f"\nMeasured here: {machine.flops / 1e9:,.0f} GFLOP/s in a matrix product, "
        f"{machine.bandwidth / 1e9:,.0f} GB/s in a copy, "
        f"{1e6 * machine.layer_call:,.0f} µs to call a layer. Assumed: prompts of {work.prompt_tokens} tokens, "
        f"answers of {work.config.max_new_tokens}, half of the product's speed. Loading, downloading and "
        "reading SAE files are not in the times."
    )
