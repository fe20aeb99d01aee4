"""What a study does, counted by running it on stand-ins, and what that costs on this machine.

The study itself runs, stage by stage, on a model of the same depth that is eight wide, SAEs of a thousand features,
canned answers, and a judge that goes by the prompt's label. Passes, tokens and products with whole dictionaries are
counted where model and SAEs are called, so a new study needs nothing for its plan. Costs are those of the real model,
counted on one without weights, at the speed that is measured here.
"""

from __future__ import annotations

import logging
import math
import os
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, replace
from math import prod
from operator import add
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from demur.errors import InputError, ModelError
from demur.judges import Judge
from demur.model import ChatModel, cache_bytes, find_layers, token_bytes
from demur.saes import DenseSae, Suite
from demur.studies.config import Sources, StudyConfig
from demur.types import PURPOSES, Answer, Label, Outcome, Prompt, PromptSet, Split, Splits, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from demur.studies.base import Study

EFFICIENCY: Final = 0.5
"""Share of a large matrix product's speed that a forward pass is assumed to reach."""


@dataclass(frozen=True)
class Work:
    """What a stage does.

    Attributes:
        passes, tokens: forward passes, and token slots read in them, padding included.
        logits: positions at which logits were computed.
        backward_passes, backward_tokens: backward passes (to activations: parameters are frozen), token slots in them.
        steps, written: steps of writing answers, one token for each row, and tokens written.
        dictionary: floating-point operations of products with whole dictionaries.
        conversions: times that the weights are turned into float32.
    """

    passes: int = 0
    tokens: int = 0
    logits: int = 0
    backward_passes: int = 0
    backward_tokens: int = 0
    steps: int = 0
    written: int = 0
    dictionary: float = 0.0
    conversions: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*map(add, astuple(self), astuple(other)))

    def towards(self, other: Work, times: float) -> Work:
        """This work and `times` what the other has more of."""
        each = zip(astuple(self), astuple(other), strict=True)
        return Work(*(one + type(one)(times * (more - one)) for one, more in each))


@dataclass(frozen=True)
class ModelSizes:
    """What the cost of a model depends on.

    Attributes:
        parameters: all of them, embeddings too.
        n_layers, d_model: of the text decoder.
        value_bytes: bytes of a weight or an activation.
        token_flops, logit_flops: of a forward pass, for each token, and for each position whose logits are computed.
        saved_bytes: kept for the gradient of activations, for each token.
        pass_bytes: held by a pass without gradients, for each token, keys and values included.
        cache_bytes: keys and values of a token.
    """

    parameters: int
    n_layers: int
    d_model: int
    value_bytes: int
    token_flops: float
    logit_flops: float
    saved_bytes: float
    pass_bytes: int = 0
    cache_bytes: int = 0


def model_sizes(config: Any, dtype: torch.dtype, tokens: int) -> ModelSizes:
    """Sizes of the text decoder of a Hugging Face configuration, with costs as in a pass over `tokens`. Raises
    ModelError: the configuration is not of a causal language model."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config(decoder=True)
    auto: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            # Masks of this attention ask nothing of the values, which a model without weights has not.
            model: Any = auto.from_config(text, dtype=dtype, attn_implementation="eager")
    except (ValueError, KeyError) as error:
        raise ModelError(f"{text.model_type!r} is not a causal language model that can be planned: {error}") from error
    model.eval().requires_grad_(False)
    flops, saved = _pass(model, tokens, logits=1)
    logit_flops = _pass(model, tokens, logits=2)[0] - flops
    return ModelSizes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        n_layers=len(find_layers(model, int(text.num_hidden_layers))),
        d_model=int(text.hidden_size),
        value_bytes=dtype.itemsize,
        token_flops=(flops - logit_flops) / tokens,
        logit_flops=logit_flops,
        saved_bytes=saved / tokens,
        pass_bytes=token_bytes(text, dtype).plain,
        cache_bytes=cache_bytes(text, dtype),
    )


def _pass(model: nn.Module, tokens: int, logits: int) -> tuple[float, float]:
    """One forward pass over `tokens` on the meta device, with the logits of the last: operations, and bytes kept for
    the gradient of activations."""
    from torch.utils.flop_counter import FlopCounterMode

    held = {parameter.untyped_storage()._cdata for parameter in model.parameters()}  # pyright: ignore[reportPrivateUsage]
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()  # pyright: ignore[reportPrivateUsage]
        return tensor

    hf: Any = model
    embedded = hf.get_input_embeddings()(torch.zeros(1, tokens, dtype=torch.long, device="meta"))
    mask = torch.ones(1, tokens, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        hf(inputs_embeds=embedded.requires_grad_(), attention_mask=mask, use_cache=False, logits_to_keep=logits)
    kept = sum(size for storage, size in saved.items() if storage not in held)
    return float(counter.get_total_flops()), float(kept)


@dataclass(frozen=True)
class Machine:
    """Measured speed.

    Attributes:
        flops: floating-point operations per second of a large product, in the model's number format.
        single: those in float32.
        memory: free bytes of a GPU; 0 for a CPU.
        bandwidth: bytes per second of a copy.
        layer_call: seconds that one call of a decoder layer takes however little it has to do.
        resident: bytes that Python and the libraries hold before any model is loaded (0 on a GPU).
    """

    flops: float
    bandwidth: float
    layer_call: float = 0.0
    resident: int = 0
    single: float = 0.0
    memory: float = 0.0

    def flops_of(self, work: Work, model: ModelSizes) -> float:
        """Floating-point operations of counted work. A backward pass to activations costs as much as a forward one."""
        tokens = work.tokens + work.backward_tokens + work.written
        return tokens * model.token_flops + (work.logits + work.written) * model.logit_flops + work.dictionary

    def seconds(self, work: Work, model: ModelSizes, processes: int = 1) -> float:
        """Seconds of counted work: its operations at half the product's speed, or the bytes of the weights for each
        written token where those take longer; and the calls of layers, backward ones twice. Several processes take
        turns at its batches, and share nothing else."""
        speed = EFFICIENCY * (self.single or self.flops if work.conversions else self.flops)
        writing = work.written * (model.token_flops + model.logit_flops) / speed
        moving = work.steps * model.parameters * model.value_bytes / self.bandwidth
        calls = model.n_layers * (work.passes + 2 * work.backward_passes + work.steps)
        reading = self.flops_of(work, model) / speed - writing
        batches = max(1, work.passes)
        turns = math.ceil(batches / processes) / batches
        return turns * (reading + max(writing, moving) + calls * self.layer_call)


GPUS: Final[Mapping[str, tuple[float, float, float, float]]] = {
    "a100": (312e12, 19.5e12, 2.04e12, 80e9),
    "h100": (989e12, 67e12, 3.35e12, 80e9),
    "h200": (989e12, 67e12, 4.8e12, 141e9),
    "l40s": (362e12, 91.6e12, 0.86e12, 48e9),
    "rtx4090": (165e12, 82.6e12, 1.01e12, 24e9),
}
"""Data sheets: operations a second in 16 bits (dense) and in float32, bytes a second of memory, and its bytes."""
_OF_DATA_SHEET: Final = 0.8
"""What large products and copies reach of that: an H200 gave 790 TFLOP/s and 4.3 TB/s."""


def machine_named(name: str, dtype: torch.dtype) -> Machine:
    """A GPU by its data sheet. Layers are called by this machine's processor. Raises InputError: it is not known."""
    if name not in GPUS:
        raise InputError(f"unknown GPU {name!r}; there are {', '.join(GPUS)}")
    *speeds, memory = GPUS[name]
    half, single, bandwidth = (_OF_DATA_SHEET * each for each in speeds)
    flops, call = half if dtype.itemsize == 2 else single, _layer_call(torch.device("cpu"))
    return Machine(flops, bandwidth, call, single=single, memory=memory)


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Speed of a large matrix product and of a copy, best of several, in well under a second."""
    side, values = (8192, 1 << 27) if device.type == "cuda" else (1024, 1 << 24)
    a = torch.ones(side, side, device=device, dtype=dtype)
    source = torch.ones(values, device=device)
    target = torch.empty_like(source)
    a32 = a.float()
    flops = 2 * side**3 / _best_seconds(lambda: a @ a, device)
    return Machine(
        flops=flops,
        single=flops if dtype is torch.float32 else 2 * side**3 / _best_seconds(lambda: a32 @ a32, device),
        # A copy reads and writes every byte.
        bandwidth=2 * 4 * values / _best_seconds(lambda: target.copy_(source), device),
        layer_call=_layer_call(device),
        resident=_resident_bytes() if device.type == "cpu" else 0,
        memory=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0,
    )


def _layer_call(device: torch.device, layers: int = 4, steps: int = 12) -> float:
    """Seconds of one call of a decoder layer that has nothing to do: a tiny model writes a few tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    config: Any = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=64, **sizes)
    model: Any = LlamaForCausalLM(config).to(device).eval()  # pyright: ignore[reportArgumentType]
    ids = torch.ones(1, 4, dtype=torch.long, device=device)
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    # `generate` does the work of inference mode itself, but not for the mask's tensors.
    with torch.inference_mode():
        seconds = _best_seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options), device)
    return seconds / (layers * steps)


def _resident_bytes() -> int:
    """What this process holds in memory now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    def once() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return min(timeit.repeat(once, number=1, repeat=4))


WIDTH: Final = 8
"""Width of the stand-in model's residual."""
_SAE_WIDTH: Final = 1021
"""Features of a stand-in SAE: a prime, so that products with whole dictionaries are known by their shapes."""
_CATEGORIES: Final = 7
COUNTED_TESTS: Final = 200
"""Test prompts of each class that are counted; work is linear in them."""
_PRODUCTS: Final = ("matmul", "__matmul__", "mm", "bmm", "mv", "linear")
_INSTEAD: Final = {"paper_settings": False, "tasks": (), "harm_judges": (), "resamples": 100}
"""Settings of work that is not priced: other programs' and other models', and arithmetic on results."""


class Stages(dict[str, float]):
    """Takes the place of a context's `seconds`: whatever was counted since the last stage ended belongs to the stage
    that ends now."""

    def __init__(self) -> None:
        super().__init__()
        self.now = Work()
        self.work: dict[str, Work] = {}

    def __setitem__(self, name: str, seconds: float) -> None:
        super().__setitem__(name, seconds)
        self.work[name], self.now = self.work.get(name, Work()) + self.now, Work()


class PromptLengths(NamedTuple):
    """Tokens of a prompt: before, in and after the user's message."""

    before: int
    message: int
    after: int


class _Block(nn.Module):
    """A decoder layer that mixes positions and costs almost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        places = torch.arange(1, hidden.shape[1] + 1)[:, None]
        return hidden + 0.1 * torch.tanh((hidden.cumsum(1) / places) @ self.weight)


class _CountingDecoder(nn.Module):
    """All of the stand-in but the output embedding: counts the passes over it."""

    def __init__(self, n_layers: int, vocabulary: int, stages: Stages) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(_Block() for _ in range(n_layers))
        self.stages = stages

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        slots = input_ids.numel()
        self.stages.now += Work(passes=1, tokens=slots)
        hidden = self.embedding(input_ids) * attention_mask[..., None]
        for layer in self.layers:
            hidden = layer(hidden)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._backward(slots))
        return (hidden,)

    def _backward(self, slots: int) -> None:
        self.stages.now += Work(backward_passes=1, backward_tokens=slots)


class _CountingModel(nn.Module):
    """Stands in for a causal LM: counts its calls, and answers by the label that the prompt names."""

    dtype = torch.float32

    def __init__(self, n_layers: int, tokenizer: PreTrainedTokenizerBase, stages: Stages) -> None:
        from transformers import GenerationConfig, LlamaConfig

        super().__init__()
        sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": 1, "num_hidden_layers": n_layers}
        self.config: Any = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=10**9, **sizes)
        self.generation_config: Any = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        self.base_model = _CountingDecoder(n_layers, len(tokenizer), stages)
        self.stages = stages
        words: Any = tokenizer.convert_tokens_to_ids(["harmful", "I", "Sure", "filler"])
        self.harmful, self.refusing, self.complying, self.filler = words

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embedding

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        *,
        use_cache: bool = False,
        **more: Any,
    ) -> SimpleNamespace:
        if use_cache:
            return self._decode(input_ids, begins=more.get("past_key_values") is None)
        hidden = self.base_model(input_ids, attention_mask)[0]
        logits = hidden[:, -logits_to_keep:] @ self.base_model.embedding.weight.T
        # Refusing is never the likeliest, so that ablation always has something to change.
        logits = logits - 20.0 * (torch.arange(logits.shape[-1]) == self.refusing)
        self.stages.now += Work(logits=logits[..., 0].numel())
        return SimpleNamespace(logits=logits)

    def _decode(self, input_ids: Tensor, *, begins: bool) -> SimpleNamespace:
        """A pass of decoding: the prompts', or a step of all rows. Drafts may save steps, which is not counted."""
        rows = len(input_ids)
        work = Work(passes=1, tokens=input_ids.numel(), logits=rows) if begins else Work(steps=1, written=rows)
        self.stages.now += work
        refuses = (input_ids == self.harmful).any(1)
        first = torch.where(refuses, self.refusing, self.complying)
        tokens = first if begins else torch.full((rows,), self.filler)
        logits = torch.nn.functional.one_hot(tokens, self.config.vocab_size)[:, None]
        # A cache that takes no drafts, and lets no row go.
        return SimpleNamespace(logits=logits, past_key_values=SimpleNamespace(layers=()))


class _DictionaryProducts(TorchFunctionMode):
    """Counts matrix products with whole dictionaries, in the real sizes; they are known by the SAEs' odd width."""

    def __init__(self, stages: Stages, d_model: int, d_sae: int) -> None:
        super().__init__()
        self._stages = stages
        self._real: dict[int, int] = {WIDTH: d_model, _SAE_WIDTH: d_sae}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _PRODUCTS and out.ndim:
            inner, last = int(args[0].shape[-1]), int(out.shape[-1])
            if _SAE_WIDTH in (inner, last):
                real = prod(self._real.get(size, size) for size in (inner, last))
                self._stages.now += Work(dictionary=2.0 * real * prod(out.shape[:-1]))
        return out


class _StandIn(ChatModel):
    """A chat model that counts conversions to float32, too."""

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        cast("Any", self.hf).stages.now += Work(conversions=1)
        yield


class _LabelJudge(Judge):
    """Harmful prompts are refused, harmless ones are not."""

    kind = "label"

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        outcomes = {"harmful": Outcome.REFUSAL, "harmless": Outcome.COMPLIANCE}
        return [Verdict(outcome=outcomes[answer.prompt.label or "harmless"], judge=self.kind) for answer in answers]


def _tokenizer(lengths: PromptLengths) -> PreTrainedTokenizerBase:
    """One token a word, and a template that adds as many tokens as the real one does."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("<bos>", "<eos>", "<unk>", "head", "tail", "harmful", "harmless", "I", "Sure", "filler")
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = cast("Any", pre_tokenizers.WhitespaceSplit())
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<eos>"}
    found = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    head, tail = "head " * (lengths.before - 1), " tail" * lengths.after
    found.chat_template = f"<bos> {head}{{{{ messages[-1]['content'] }}}}{tail}"
    return found


def _splits(config: StudyConfig, words: int) -> Splits:
    def prompts(label: Label, purpose: str) -> PromptSet:
        texts = [f"{label} {purpose} {n}" + " filler" * (words - 3) for n in range(getattr(config.n, purpose))]
        made = (
            Prompt(id=f"{purpose}/{label}/{n}", text=text, label=label, category=f"kind {n % _CATEGORIES}")
            for n, text in enumerate(texts)
        )
        return PromptSet(name=f"{label}-{purpose}", prompts=tuple(made))

    both: Any = {name: Split(harmful=prompts("harmful", name), harmless=prompts("harmless", name)) for name in PURPOSES}
    return Splits(**both)


def _thin(suite: Suite) -> Suite:
    """Random SAEs for the same layers; where any of the real ones is TopK, so are they."""
    k = next((spec.k or 1 for spec in suite.specs if spec.activation == "topk"), None)

    def sae(layer: int) -> DenseSae:
        w_dec, zeros = torch.randn(_SAE_WIDTH, WIDTH), torch.zeros(_SAE_WIDTH)
        rows: dict[str, Any] = {"w_enc": w_dec.T.contiguous(), "b_enc": zeros, "threshold": None, "w_dec": w_dec}
        return DenseSae(layer=layer, k=k, b_dec=torch.zeros(WIDTH), **rows)

    return Suite.from_dense({layer: sae(layer) for layer in suite.layers})


def count_work(
    study: Study[Any, Any],
    config: StudyConfig,
    model: ModelSizes,
    suite: Suite,
    lengths: PromptLengths,
    batch_tokens: int,
) -> dict[str, Work]:
    """Run a study on stand-ins and count what it does, by timed stage. Of more test prompts than 200 the first 100 and
    200 are counted, and what the second hundred adds is what each further hundred does. Raises DemurError: the study
    stops on the stand-ins.

    Args:
        study: which one.
        config: its options; the sizes of splits, the grids and the limits count, files and names do not.
        model, suite: the real ones, of which only sizes count.
        lengths: tokens of a prompt.
        batch_tokens: tokens of a pass.
    """
    config = config.model_copy(update={"max_batch_tokens": batch_tokens})
    tests = config.n.test
    if tests <= COUNTED_TESTS:
        return _counted(study, config, model, suite, lengths)
    few, more = (
        _counted(study, _with_tests(config, n), model, suite, lengths) for n in (COUNTED_TESTS // 2, COUNTED_TESTS)
    )
    times = (tests - COUNTED_TESTS // 2) / (COUNTED_TESTS // 2)
    return {name: few.get(name, Work()).towards(work, times) for name, work in more.items()}


def _with_tests(config: StudyConfig, n: int) -> StudyConfig:
    return config.model_copy(update={"n": config.n.model_copy(update={"test": n})})


def _counted(
    study: Study[Any, Any], config: StudyConfig, model: ModelSizes, suite: Suite, lengths: PromptLengths
) -> dict[str, Work]:
    from demur.studies.context import open_context
    from demur.studies.inputs import Inputs, before_names, other_names

    stages, logger = Stages(), logging.getLogger("demur")
    with ExitStack() as kept:
        # Global generators are left as they are, and what the stand-ins are warned of is not said.
        kept.enter_context(cast("Any", torch.random).fork_rng(devices=[]))
        kept.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        folder = Path(kept.enter_context(TemporaryDirectory()))
        torch.manual_seed(0)
        tokenizer = _tokenizer(lengths)
        hf: Any = _CountingModel(model.n_layers, tokenizer, stages)
        chat = _StandIn(hf, tokenizer, name="stand-in", max_batch_tokens=config.max_batch_tokens)
        splits = _splits(config, lengths.message)
        others = {name: _thin(suite) for name in other_names(config)}
        inputs = Inputs("stand-in", "stand-ins", chat, _thin(suite), splits, _LabelJudge(), others=others)
        # Another name is another identity, so that no stage is taken for the studied model's.
        again = {name: _StandIn(hf, tokenizer, name=name, max_batch_tokens=chat.max_batch_tokens)
                 for name in before_names(config)}  # fmt: skip
        inputs = replace(inputs, before={name: replace(inputs, model=model) for name, model in again.items()})
        planned = _without_sources(config, folder, lengths.message)
        context = kept.enter_context(open_context(study, planned, folder / "run", inputs=inputs))
        context.seconds = stages
        kept.enter_context(_DictionaryProducts(stages, model.d_model, max(spec.d_sae for spec in suite.specs)))
        study.run(context)
    if stages.now != Work():
        stages["rest"] = 0.0
    return stages.work


def _without_sources(config: StudyConfig, folder: Path, words: int) -> StudyConfig:
    """The configuration with stand-ins for the files and sets that it names, and without other programs' work."""
    texts = folder / "texts.txt"
    harmless = (f"harmless text {number}" + " filler" * (words - 3) for number in range(2000))
    texts.write_text("".join(f"{text}\n" for text in harmless), encoding="utf-8")
    fields, reads_sources = type(config).model_fields, get_args(Sources)[1]
    named = {name: (str(texts),) for name, field in fields.items() if reads_sources in field.metadata}
    instead = {name: value for name, value in _INSTEAD.items() if hasattr(config, name)}
    return config.model_copy(update={name: text for name, text in named.items() if getattr(config, name)} | instead)
