"""One adapter for Hugging Face causal LMs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from demur.errors import ModelError
from demur.model import _hooks
from demur.model._chat import Batch, ChatFormat, TokenizedPrompt, check_length, pad
from demur.model._memory import by_length, halving, next_batch, token_budget
from demur.types import Prompt, as_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

_OTHER_MODALITIES = ("vision", "audio", "image", "visual", "encoder")


def find_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The text decoder's layers: the outermost `ModuleList` of `n_layers` outside vision and audio towers.

    Raises:
        ModelError: there is no such list, or more than one.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != n_layers:
            continue
        if any(word in part for part in name.split(".") for word in _OTHER_MODALITIES):
            continue
        if not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    if len(found) != 1:
        raise ModelError(
            f"expected one list of {n_layers} decoder layers in {type(model).__name__}, found "
            f"{', '.join(found) or 'none'}; only decoder-only causal language models are supported"
        )
    return next(iter(found.values()))


class Budgets(NamedTuple):
    """Tokens that one pass may hold, and one that keeps activations for a backward pass."""

    plain: int
    gradients: int


class ChatModel:
    """A causal LM with its tokenizer and chat format: text in, batches, residuals and logits out.

    The wrapped model is put in evaluation mode and its parameters are frozen, so that gradients are taken of
    activations only. Nothing else about it changes; all access to residuals is through hooks that are gone when
    their context ends.

    Attributes:
        hf: the wrapped model.
        layers: its decoder layers; the output of `layers[l]` is `x[l]`, shape `batch pos d_model`.
        chat: the chat format.

    Raises:
        ModelError: no decoder layers are found, the model was compiled, or its dtype cannot hold its activations.
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
        self.layers: tuple[nn.Module, ...] = tuple(find_layers(hf, self.n_layers))
        self.chat = ChatFormat(tokenizer, name=name, system_prompt=system_prompt)
        context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
        self.max_context = int(context) if context else None
        self.max_batch_tokens = max_batch_tokens
        self._intermediate = int(getattr(config, "intermediate_size", 4 * self.d_model))
        self._keeps_logits = "logits_to_keep" in inspect.signature(hf.forward).parameters
        _refuse_unfit(hf, name)
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
    ) -> ChatModel:
        """Load a model from a local folder or the hub.

        Args:
            source: folder or hub id.
            revision: branch, tag or commit on the hub.
            dtype: "auto" (as the checkpoint says), "float32", "bfloat16" or "float16".
            device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:N", "mps", or a `device_map`
                ("balanced", …).
            system_prompt: put before every conversation.
            max_batch_tokens: upper bound on tokens in one pass (default: from free memory).

        Raises:
            ModelError: the model or its tokenizer cannot be loaded, or its weights hold NaN or infinity.
        """
        from transformers import AutoConfig, AutoTokenizer

        name = str(source)
        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        try:
            config = AutoConfig.from_pretrained(name, **options)
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"cannot load the model {name!r}: {error}\nExpected a folder with config.json and tokenizer files, or "
                "a hub id that you can reach (gated models need `hf auth login`)"
            ) from error
        _refuse_dtype(config, dtype, name)
        # Before the weights: a base model without a chat template is found out at the cost of its tokenizer.
        ChatFormat(tokenizer, name=name, system_prompt=system_prompt).tokenize("word")
        placement: dict[str, Any] = {"device_map": device} if _is_map(device) else {}
        hf = _load_weights(name, config, {**options, **placement, "dtype": dtype})
        if not _is_map(device):
            hf.to(_device(device))  # pyright: ignore[reportArgumentType, reportCallIssue]
        _refuse_nonfinite(hf, name)
        return cls(hf, tokenizer, name=name, system_prompt=system_prompt, max_batch_tokens=max_batch_tokens)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding."""
        return self.hf.get_input_embeddings().weight.device  # pyright: ignore[reportReturnType]

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 while the context is open; the stored values, and afterwards their dtype, stay the same.

        Half precision rounds away effects of single features (8 bits of a logit of 20 are steps of 0.1).
        """
        halves = [(p, p.dtype) for p in self.hf.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
        try:
            for parameter, _ in halves:
                parameter.data = parameter.data.float()
            yield
        finally:
            for parameter, dtype in halves:
                parameter.data = parameter.data.to(dtype)

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.hf.parameters())

    def layer_device(self, layer: int) -> torch.device:
        """Where layer `layer` runs (layers may be spread over devices)."""
        return next(self.layers[layer].parameters()).device

    @property
    def pad_id(self) -> int:
        """The token that fills padding (never attended to, so any token serves)."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(token, int):
                return token
        return 0

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end the model's turn."""
        eos: Any = getattr(self.hf.generation_config, "eos_token_id", None)
        if eos is None:
            eos = self.tokenizer.eos_token_id
        return tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (int(eos),)

    def tokenize(self, prompts: Iterable[Prompt | str], *, new_tokens: int = 0) -> list[TokenizedPrompt]:
        """Tokens of each prompt in the chat format; plain texts have their place in the list as id.

        Raises:
            InputError: a prompt does not fit the context together with `new_tokens`; names it.
        """
        items = [self.chat.tokenize(prompt) for prompt in as_prompts(prompts)]
        for item in items:
            check_length(item, new_tokens, self.max_context)
        return items

    def batch(self, items: Sequence[TokenizedPrompt]) -> Batch:
        """Stack conversations into one left-padded batch on the model's device."""
        return pad(items, pad_id=self.pad_id, device=self.device)

    def budget(self, *, gradients: bool = False) -> int:
        """Tokens for one pass: what `budgets` says."""
        return self.budgets.gradients if gradients else self.budgets.plain

    @cached_property
    def budgets(self) -> Budgets:
        """Tokens for one pass without and with gradients, from the memory that is free when this is first asked.

        Kept from then on (and may be replaced), so that the same prompts always fall into the same batches.
        """
        if self.max_batch_tokens is not None:
            return Budgets(self.max_batch_tokens, self.max_batch_tokens)
        per_layer = self.dtype.itemsize * (12 * self.d_model + 4 * self._intermediate)
        return Budgets(token_budget(self.device, 2 * per_layer), token_budget(self.device, self.n_layers * per_layer))

    def over_batches(
        self,
        items: Sequence[TokenizedPrompt],
        run: Callable[[Batch], T],
        *,
        extra_tokens: int = 0,
        gradients: bool = False,
        done: Collection[str] = (),
    ) -> Iterator[tuple[tuple[int, ...], T]]:
        """Run batches of similar length, longest first, and yield the places of each batch's items with its result.

        A batch that runs out of memory is split in half and repeated, and the budgets are halved for the rest.

        Args:
            items: conversations.
            run: what to do with a batch.
            extra_tokens: tokens each row grows by (generation).
            gradients: activations are kept for a backward pass.
            done: prompt ids; a batch that holds only these is left out. Batches are planned over all items whatever
                is left out, so that a resumed job computes the remaining ones in the very batches of a clean run.
        """
        lengths = [len(item) + extra_tokens for item in items]

        def one(group: Sequence[int]) -> tuple[tuple[int, ...], T]:
            return tuple(group), run(self.batch([items[place] for place in group]))

        left = by_length(lengths)
        while left:
            group = next_batch(lengths, left, self.budget(gradients=gradients))
            left = left[len(group) :]
            if not all(items[place].prompt_id in done for place in group):
                yield from halving(group, one, lambda longest=lengths[group[0]]: self._shrink(longest))

    def each(
        self,
        items: Sequence[TokenizedPrompt],
        run: Callable[[Batch], Iterable[T]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[T]:
        """What `run` gives for each row of a batch, in the order of `items`.

        Args:
            items: conversations, batched as `over_batches` does.
            run: gives one value for each row.
            progress: called with (done, all) items after each batch.
        """
        found: dict[int, T] = {}
        for places, values in self.over_batches(items, run):
            found |= dict(zip(places, values, strict=True))
            if progress is not None:
                progress(len(found), len(items))
        return [found[place] for place in range(len(items))]

    def _shrink(self, longest: int) -> bool:
        """Halve the budgets, down to one prompt of that length; False when they cannot be lowered any more."""
        before = self.budgets
        self.budgets = Budgets(max(longest, before.plain // 2), max(longest, before.gradients // 2))
        return self.budgets.plain < before.plain or self.budgets.gradients < before.gradients

    def last_logits(self, batch: Batch) -> Float[Tensor, "batch vocab"]:
        """Logits at the last position of each row (float32). Gradients flow if any activation asks for them."""
        return self.logits(batch, 1)[:, -1].float()

    def logits(self, batch: Batch, keep: int) -> Float[Tensor, "batch kept vocab"]:
        """Logits at the last `keep` positions (all, where there are fewer), in the model's dtype."""
        options: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_logits else {}
        output = self.hf(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            **options,
        )
        return output.logits[:, -keep:]

    def capture(
        self, which: Sequence[int] | None = None, transform: Callable[[Tensor], Tensor] | None = None
    ) -> AbstractContextManager[_hooks.Captured]:
        """Record residuals while the context is open; see `demur.model.capture`."""
        return _hooks.capture(self.layers, which, transform)

    def edited(self, edits: Mapping[int, Sequence[_hooks.Edit]]) -> AbstractContextManager[None]:
        """Edit residuals while the context is open; see `demur.model.edited`."""
        return _hooks.edited(self.hf, self.layers, edits)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of answer tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _is_map(device: str) -> bool:
    return device in ("balanced", "balanced_low_0", "sequential")


def _device(device: str) -> torch.device:
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ModelError(f"unknown device {device!r}; expected auto, cpu, cuda, cuda:N, mps or balanced") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def _load_weights(name: str, config: Any, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # Multimodal Gemma 3 is registered as an image-text model; its text decoder is what demur reads.
    multimodal = type(config) in AutoModelForImageTextToText._model_mapping  # pyright: ignore
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    try:
        return auto.from_pretrained(name, **options)
    except ImportError as error:
        raise ModelError(f"cannot load {name!r} over several devices: {error}\nInstall demur[multi-gpu]") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load the weights of {name!r}: {error}") from error


def _refuse_dtype(config: Any, dtype: str, name: str) -> None:
    wanted = str(getattr(config, "dtype", None) or "") if dtype == "auto" else dtype
    if str(config.model_type).startswith("gemma3") and wanted.endswith("float16") and not wanted.endswith("bfloat16"):
        raise ModelError(
            f"{name} is a Gemma 3 model, whose activations overflow float16; use --dtype bfloat16 or float32"
        )


def _refuse_nonfinite(hf: PreTrainedModel, name: str) -> None:
    for parameter, values in hf.named_parameters():
        if values.is_meta:
            raise ModelError(
                f"{name} does not fit the devices: {parameter} was offloaded, and demur reads and changes layers where "
                "they run. Use a smaller dtype or model, or more devices"
            )
        bad = ~torch.isfinite(values.detach())
        if bool(bad.any()):
            first = tuple(int(i) for i in bad.nonzero()[0])
            raise ModelError(
                f"{name}: {parameter} holds NaN or infinity, first at {first}; the checkpoint is damaged or was stored "
                "in a dtype that overflowed. Download it again, or load it in another --dtype"
            )


def _refuse_unfit(hf: PreTrainedModel, name: str) -> None:
    if hf.dtype == torch.float16:
        _refuse_dtype(hf.config, "float16", name)
    compiled = [n or "the model" for n, m in hf.named_modules() if m._compiled_call_impl is not None]  # pyright: ignore
    if compiled or type(hf).__name__ == "OptimizedModule":
        raise ModelError(
            f"{name} was compiled with torch.compile ({', '.join(compiled[:3]) or 'wrapped'}): hooks added afterwards "
            "are silently ignored, so nothing could be read or changed. Pass the uncompiled model"
        )
    softcap = getattr(hf.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if softcap and hf.config._attn_implementation == "sdpa":  # pyright: ignore[reportPrivateUsage]
        raise ModelError(
            f"{name} caps its attention logits, which the sdpa kernel leaves out; load it with "
            'attn_implementation="eager"'
        )


def load_model(source: str | Path, **options: Any) -> ChatModel:
    """Short for `ChatModel.load`."""
    return ChatModel.load(source, **options)
