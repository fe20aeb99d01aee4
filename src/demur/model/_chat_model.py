"""One adapter for Hugging Face causal LMs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from demur.errors import InputError
from demur.model._chat_format import Batch, ChatFormat, Items, TokenizedPrompt, pad
from demur.model._decoding import decode_greedily
from demur.model._hooks import (
    NO_SITES,
    AnswerGuard,
    BoundIntervention,
    CompiledIntervention,
    Cursor,
    Edit,
    Point,
    Residuals,
    Sites,
    capture,
    final_states_of,
    folded_head,
    head_only,
    hooked,
    reading,
    residuals_of,
    track,
)
from demur.model._loading import end_tokens, find_layers, find_point, load_checkpoint, refuse_unfit
from demur.model._resources import (
    Budgets,
    Progress,
    answers_fill,
    by_length,
    cache_bytes,
    halving,
    next_batch,
    padding_budget,
    token_budget,
    token_bytes,
)
from demur.types import Answer, Answers, Prompt, Take, as_prompts, take_all

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

_CPU_ANSWER_SHARE = 0.25
"""What a new token counts for in the budget of a pass on a CPU."""


class ChatModel:
    """A causal LM with its tokenizer and chat format: text in, batches, residuals and logits out.

    The wrapped model `hf` is put in evaluation mode and its parameters are frozen, so that gradients are taken of
    activations only. Nothing else about it changes; residuals are reached through hooks that go when their context
    ends. The output of `layers[l]` is `x[l]`, shape `batch pos d_model`. Raises ModelError: no decoder layers are
    found, the model was compiled, or its dtype cannot hold its activations.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        system_prompt: str | None = None,
        max_batch_tokens: int | None = None,
    ) -> None:
        config = hf.config.get_text_config(decoder=True)
        self.hf = hf
        self.tokenizer = tokenizer
        self.name = name
        self.n_layers = int(config.num_hidden_layers)
        self.d_model = int(config.hidden_size)
        self.vocabulary = int(config.vocab_size)
        self.layers: tuple[nn.Module, ...] = tuple(find_layers(hf, self.n_layers))
        self.chat = ChatFormat(tokenizer, name=name, system_prompt=system_prompt)
        context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
        self.max_context = int(context) if context else None
        self.max_batch_tokens = max_batch_tokens
        self._serving: Batch | None = None
        self._open: tuple[str, ...] = ()
        # Whether the model can leave out the logits of earlier tokens.
        self.keeps_logits = "logits_to_keep" in inspect.signature(hf.forward).parameters
        refuse_unfit(hf, name)
        hf.eval()
        hf.requires_grad_(False)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        system_prompt: str | None = None,
        max_batch_tokens: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> ChatModel:
        """Load a model from a local folder or the hub. Raises ModelError: the model or its tokenizer cannot be loaded
        or needs code of its own, the device is not there, or weights are missing, of another shape, NaN or infinite.

        Args:
            source: folder or hub id.
            revision: branch, tag or commit on the hub.
            dtype: "auto" (as the checkpoint says), "float32", "bfloat16" or "float16".
            device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N", "mps", or a `device_map` ("balanced", …).
            system_prompt: put before every conversation.
            max_batch_tokens: upper bound on tokens in one pass (default: from free memory).
            tokenizer: in place of the checkpoint's own, with its chat template (a base model has none).
        """
        name = str(source)
        asked: dict[str, Any] = {"revision": revision, "dtype": dtype, "device": device, "tokenizer": tokenizer}
        loaded = load_checkpoint(name, **asked, system_prompt=system_prompt)
        return cls(*loaded, name=name, system_prompt=system_prompt, max_batch_tokens=max_batch_tokens)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding."""
        return self.hf.get_input_embeddings().weight.device  # pyright: ignore[reportReturnType]

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 while the context is open: half precision rounds away effects of single features (8 bits
        of a logit of 20 are steps of 0.1). The stored values, and afterwards their dtype, stay the same."""
        halves = [(p, p.dtype) for p in self.hf.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
        try:
            for parameter, _ in halves:
                parameter.data = parameter.data.float()
            yield
        finally:
            for parameter, dtype in halves:
                parameter.data = parameter.data.to(dtype)

    def points(self, sites: Sites = NO_SITES) -> tuple[Point, ...]:
        """Where to hook each layer: what leaves it, or its place in `sites`; raises as `find_point` does."""
        return tuple(find_point(layer, sites.get(n, "resid_post")) for n, layer in enumerate(self.layers))

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.hf.parameters())

    def layer_device(self, layer: int) -> torch.device:
        """Where layer `layer` runs (layers may be spread over devices)."""
        return next(self.layers[layer].parameters()).device

    @property
    def pad_id(self) -> int:
        """The token that fills padding (never attended to, so any token serves)."""
        tokens = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in tokens if isinstance(token, int)), 0)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end the model's turn."""
        return end_tokens(self.hf, self.tokenizer)

    def tokenize(self, prompts: Iterable[Prompt | str], *, new_tokens: int = 0) -> list[TokenizedPrompt]:
        """Tokens of each prompt in the chat format; plain texts have their place in the list as id. An `InputError`
        names a prompt that does not fit the context together with `new_tokens`."""
        items = [self.chat.tokenize(prompt) for prompt in as_prompts(prompts)]
        for item in items:
            if self.max_context is not None and len(item) + new_tokens > self.max_context:
                answer = f" plus {new_tokens} new tokens" if new_tokens else ""
                raise InputError(
                    f"prompt {item.prompt_id} is {len(item)} tokens long{answer}, but the model's context holds "
                    f"{self.max_context}; shorten or drop it, or lower --max-new-tokens"
                )
        return items

    def batch(self, items: Items) -> Batch:
        """Stack conversations into one left-padded batch on the model's device."""
        return pad(items, pad_id=self.pad_id, device=self.device)

    @cached_property
    def budgets(self) -> Budgets:
        """Tokens for one pass without and with gradients, from the memory that is free when this is first asked. Kept
        from then on (and may be replaced), so that the same prompts always fall into the same batches."""
        if self.max_batch_tokens is not None:
            return Budgets(self.max_batch_tokens, self.max_batch_tokens)
        each = token_bytes(self.hf.config.get_text_config(decoder=True), self.dtype)
        return Budgets(*(token_budget(self.device, size) for size in each))

    def over_batches(
        self,
        items: Items,
        run: Callable[[Batch], T],
        *,
        extra_tokens: int = 0,
        gradients: bool = False,
        fill: int = 1,
        take: Take = take_all,
    ) -> Iterator[tuple[tuple[int, ...], T]]:
        """Run batches of similar length, longest first, and yield the places of each batch's items with its result.

        A batch that runs out of memory is split in half and repeated, and the budgets are halved for the rest.

        Args:
            items: conversations.
            run: what to do with a batch.
            extra_tokens: tokens each row grows by (generation).
            gradients: activations are kept for a backward pass.
            fill: budgets that one batch fills.
            take: given the prompt ids of a batch just before it is run; where it says False the batch is left out.
                Batches are planned over all items whatever is left out, so that a resumed job, or one that several
                processes share, computes the very batches of a clean run.
        """
        lengths = [len(item) + extra_tokens for item in items]

        def one(group: Sequence[int]) -> tuple[tuple[int, ...], T]:
            return tuple(group), run(self.batch([items[place] for place in group]))

        left = by_length(lengths)
        while left:
            budget = fill * (self.budgets.gradients if gradients else self.budgets.plain)
            group = next_batch(lengths, left, budget, padding_budget(self.device) if fill == 1 else math.inf)
            left = left[len(group) :]
            if take([items[place].prompt_id for place in group]):
                yield from halving(group, one, partial(self._shrink, lengths[group[0]]))

    def each(
        self, items: Items, run: Callable[[Batch], Iterable[T]], progress: Progress = None, *, gradients: bool = False
    ) -> list[T]:
        """What `run` gives for each row of a batch, in the order of `items`; `gradients` as of `over_batches`."""
        found: dict[int, T] = {}
        for places, values in self.over_batches(items, run, gradients=gradients):
            found |= dict(zip(places, values, strict=True))
            if progress is not None:
                progress(len(found), len(items))
        return [found[place] for place in range(len(items))]

    def _shrink(self, longest: int) -> bool:
        """Halve the budgets, down to one prompt of that length; False when they cannot be lowered any more."""
        before = self.budgets
        self.budgets = Budgets(*(max(longest, tokens // 2) for tokens in before))
        return self.budgets.plain < before.plain or self.budgets.gradients < before.gradients

    def mean_over(
        self, items: Items, layers: Iterable[int], read: Callable[[Tensor], Float[Tensor, " batch *_"]]
    ) -> dict[int, Tensor]:
        """Layer → mean over items of `read(residual)`, a row for each; sums are float64."""
        totals: dict[int, Tensor] = {}

        def run(batch: Batch) -> dict[int, Tensor]:
            sums: dict[int, Tensor] = {}

            def add(layer: int, residual: Tensor) -> None:
                sums[layer] = read(residual).cpu().double().sum(0)

            with torch.inference_mode(), hooked(self.layers, {layer: partial(add, layer) for layer in layers}):
                self.last_logits(batch)
            return sums

        for _, sums in self.over_batches(items, run):
            totals = {layer: totals[layer] + part if totals else part for layer, part in sums.items()}
        return {layer: (total / len(items)).float() for layer, total in totals.items()}

    def last_logits(self, batch: Batch) -> Float[Tensor, "batch vocab"]:
        """Logits at the last position of each row (float32). Gradients flow if any activation asks for them."""
        options: dict[str, Any] = {"logits_to_keep": 1} if self.keeps_logits else {}
        with self.serving(batch), folded_head(self.hf):
            output = self.hf(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
                **options,
            )
        return output.logits[:, -1].float()

    def final_states(self, batch: Batch) -> Float[Tensor, "batch pos d_model"]:
        """What the output embedding reads, at every position, in the model's dtype; `head` makes logits of it. For
        logits at many positions, which would not fit in memory together."""
        return final_states_of(self.hf, partial(self.last_logits, batch))

    def head(self, states: Float[Tensor, "token d_model"]) -> Float[Tensor, "token vocab"]:
        """Logits (float32) of what the output embedding reads: with what the model does to logits itself, as a cap."""
        ids = torch.zeros(1, len(states), dtype=torch.long, device=self.device)
        with torch.no_grad(), head_only(self.hf, states[None]):
            return self.hf(input_ids=ids, use_cache=False).logits[0].float()

    def residuals(self, batch: Batch, layers: Sequence[int], sites: Sites = NO_SITES) -> Residuals:
        """Residuals `x[l]` of some layers (`[batch, pos, d_model]`, the model's dtype), or what is at other places of
        them, from one pass that ends after the deepest. Interventions that are open act; padding is left in."""
        return residuals_of(self.points(sites), layers, partial(self.last_logits, batch))

    def capture(
        self,
        which: Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        sites: Sites = NO_SITES,
    ) -> AbstractContextManager[Residuals]:
        """Record residuals, or what is at other places, while the context is open; see `demur.model.capture`."""
        return capture(self.points(sites), which, transform)

    def reading(self, sites: Sites) -> AbstractContextManager[Residuals]:
        """Keep what dictionaries read that do not read the residual, pass by pass; see `demur.model.reading`."""
        return reading(self.points(sites), sites)

    @contextmanager
    def edited(self, edits: Mapping[int, Sequence[Edit]], reads: Sites = NO_SITES) -> Iterator[None]:
        """Apply `edits[l]`, in order, to the residual that leaves layer `l`; their cursor holds what is at `reads`."""
        chains = {layer: chain for layer, chain in edits.items() if chain}
        with ExitStack() as stack:
            if chains:
                cursor = stack.enter_context(track(self.hf))
                cursor.read = stack.enter_context(self.reading(reads))
                functions = {layer: partial(_applied, chain, cursor) for layer, chain in chains.items()}
                stack.enter_context(hooked(self.layers, functions))
            yield

    def intervene(self, interventions: BoundIntervention | Iterable[BoundIntervention]) -> AbstractContextManager[None]:
        """Change what the model computes while the context is open, in everything that it is called for.

        Contexts nest: an inner one acts on what the outer one made. Several interventions act in the order given, each
        on what the one before it made (bind feature interventions together to read them from one residual). Raises
        InputError: an intervention does not fit the model; during a pass, it differs by prompt and the model is called
        by other code, on texts without prompt ids.
        """
        several = interventions if isinstance(interventions, Iterable) else [interventions]
        return self.installed([each.compile(self) for each in several])

    @contextmanager
    def installed(self, compiled: Iterable[CompiledIntervention]) -> Iterator[None]:
        """`intervene` with interventions that are compiled for this model already."""
        before = self._open
        try:
            with ExitStack() as stack:
                for each in compiled:
                    stack.enter_context(self.edited(self._edits_of_the_batch(each), each.reads))
                    self._open = (*self._open, each.id)
                yield
        finally:
            self._open = before

    def _edits_of_the_batch(self, compiled: CompiledIntervention) -> dict[int, list[Edit]]:
        """Edits that are made anew for each batch that the model serves."""
        latest: list[tuple[Batch | None, Mapping[int, Sequence[Edit]]]] = []

        def edit(layer: int, residual: Tensor, cursor: Cursor) -> Tensor:
            if not latest or latest[0][0] is not self._serving:
                latest[:] = [(self._serving, compiled.edits(self._serving))]
            return _applied(latest[0][1].get(layer, ()), cursor, residual)

        return {layer: [partial(edit, layer)] for layer in compiled.layers}

    @contextmanager
    def serving(self, batch: Batch | None) -> Iterator[None]:
        """Say which batch the passes of this context are for: what differs by prompt, or stops where it ends, needs it.
        Passes of this class (`logits`, `generate`) say so themselves."""
        before, self._serving = self._serving, batch
        try:
            yield
        finally:
            self._serving = before

    @property
    def intervention_id(self) -> str:
        """Names the interventions that are open; "none" for the clean model."""
        return " + ".join(each for each in self._open if each != "none") or "none"

    def generate(
        self,
        prompts: Iterable[Prompt | str],
        *,
        max_new_tokens: int = 64,
        temperature: float | None = None,
        seed: int = 0,
        guard: AnswerGuard | None = None,
        progress: Progress = None,
    ) -> Answers:
        """Answer prompts, in their order, under the interventions that are open; see `answer_batches`."""
        prompts = as_prompts(prompts)
        found: dict[str, Answer] = {}
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        for answers in answer_batches(self, prompts, guard=guard, **options):
            found |= {answer.prompt.id: answer for answer in answers}
            if progress is not None:
                progress(len(found), len(prompts))
        return Answers(found[prompt.id] for prompt in prompts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of answer tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _applied(edits: Iterable[Edit], cursor: Cursor, residual: Tensor) -> Tensor:
    for edit in edits:
        residual = edit(residual, cursor)
    return residual


def load_model(source: str | Path, **options: Any) -> ChatModel:
    """Short for `ChatModel.load`."""
    return ChatModel.load(source, **options)


def answer_batches(
    model: ChatModel,
    prompts: Iterable[Prompt | str],
    intervention: BoundIntervention | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    seed: int = 0,
    guard: AnswerGuard | None = None,
    drafts: Mapping[str, Sequence[Sequence[int]]] | None = None,
    take: Take = take_all,
) -> Iterator[list[Answer]]:
    """Answer prompts batch by batch, and yield each batch's answers as soon as they are there. Raises InputError: a
    prompt does not fit the context together with `max_new_tokens`.

    Args:
        model: the chat model.
        prompts: what to answer; batched by length.
        intervention: what to do to the model meanwhile, beside the interventions that are open already.
        max_new_tokens: limit on an answer's length.
        temperature: None for greedy decoding; sampling is from the whole distribution.
        seed: of sampling.
        guard: reads the answers in the pass that writes them, and stops those that it judges harmful. A stopped answer
            is `stopped`, not `finished`, and ends before the token at which it was stopped.
        drafts: by the prompt's text, tokens of answers that the model may well give to it, the likeliest last: where it
            does, greedy decoding takes several tokens a pass.
        take: given the prompt ids of a batch just before it is answered; where it says False the batch is left out.
            Other batches are answered whole, so that a resumed job yields what a clean one would.
    """
    prompts = as_prompts(prompts)
    items = model.tokenize(prompts, new_tokens=max_new_tokens)
    compiled = [] if intervention is None else [intervention.compile(model)]
    ends, known, greedy = model.eos_ids, drafts or {}, temperature is None and guard is None
    guesses = {prompt.id: known[prompt.text] for prompt in prompts if prompt.text in known}

    def run(batch: Batch) -> tuple[str, list[tuple[str, bool, bool]]]:
        released: Sequence[int | None] = [None] * len(batch)
        with torch.inference_mode(), model.installed(compiled), folded_head(model.hf):
            if greedy:
                tokens = decode_greedily(model, batch, max_new_tokens, [guesses.get(p, ()) for p in batch.prompt_ids])
            else:
                tokens, released = _sample(model, batch, max_new_tokens, temperature, seed, guard)
            return model.intervention_id, [_read(model, ends, *each) for each in zip(tokens, released, strict=True)]

    # A step makes one token of each row: where the budget is for time, on a CPU, an answer weighs less than its prompt.
    for_time = model.device.type == "cpu" and model.max_batch_tokens is None
    extra = math.ceil((_CPU_ANSWER_SHARE if for_time else 1.0) * max_new_tokens)
    kept = cache_bytes(model.hf.config.get_text_config(decoder=True), model.dtype)
    fill = answers_fill(kept) if for_time and greedy else 1
    for places, (name, answers) in model.over_batches(items, run, extra_tokens=extra, fill=fill, take=take):
        yield [
            Answer(prompt=prompts[place], text=text, intervention=name, finished=finished, stopped=stopped)
            for place, (text, finished, stopped) in zip(places, answers, strict=True)
        ]


def _read(model: ChatModel, ends: Sequence[int], ids: list[int], released: int | None) -> tuple[str, bool, bool]:
    """Text up to the end of the model's turn, or to where it was stopped; and whether it came to either."""
    end = next((n for n, token in enumerate(ids) if token in ends), None)
    # What a guard thinks of the end of the turn, and of the padding after it, comes too late to stop anything.
    if released is not None and (end is None or released < end):
        return model.decode(ids[:released]), False, True
    return model.decode(ids[:end]), end is not None, False


def _sample(
    model: ChatModel,
    batch: Batch,
    max_new_tokens: int,
    temperature: float | None,
    seed: int,
    guard: AnswerGuard | None,
) -> tuple[list[list[int]], Sequence[int | None]]:
    """Answers written token by token by all rows together, sampled (or greedy: None) or watched by a guard; and how
    many tokens of each came before the one that stopped it."""
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices, enabled=temperature is not None),
        _generation_config(model, max_new_tokens, temperature) as config,
        model.serving(batch),
        nullcontext() if guard is None else guard.watch(batch) as watch,
    ):
        if temperature is not None:
            torch.manual_seed(seed)
        stops = None if watch is None else [lambda _ids, _scores, **_: watch.stopped()]
        tokens: Tensor = cast("Any", model.hf).generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=config,
            stopping_criteria=stops,
        )
        released = [None] * len(batch) if watch is None else watch.released()
        return tokens[:, batch.input_ids.shape[1] :].tolist(), released


@contextmanager
def _generation_config(model: ChatModel, max_new_tokens: int, temperature: float | None) -> Iterator[GenerationConfig]:
    """Settings of `generate` in place of the checkpoint's own, from which it would fill in whatever is not set."""
    from transformers import GenerationConfig

    sampling = {} if temperature is None else {"do_sample": True, "temperature": temperature, "top_k": 0}
    ends = {"eos_token_id": list(model.eos_ids) or None, "pad_token_id": model.pad_id}
    config = GenerationConfig(max_new_tokens=max_new_tokens, **ends, **sampling)
    holder = cast("Any", model.hf)
    before, holder.generation_config = holder.generation_config, config
    try:
        yield config
    finally:
        holder.generation_config = before
