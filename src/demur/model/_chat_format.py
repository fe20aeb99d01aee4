"""Chat prompts as tokens, with the region of the conversation that each token belongs to."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from itertools import dropwhile
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from demur.errors import ModelError
from demur.types import Prompt, as_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Llama 3's template writes today's date into the system message, which would make every run its own experiment.
PINNED_DATE = datetime.date(2024, 7, 26)

# Stands for the user's message while the template is taken apart; no template alters it and no message contains it.
_MARK = "demurmessagegoeshere"

_REMEMBERED = 4096
"""Prompts whose tokens are kept."""

_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1""")


class Region(IntEnum):
    """What part of a rendered chat prompt a token belongs to."""

    PAD = 0
    SPECIAL = 1
    """BOS, headers, system message: everything before the user's words. SAEs were not trained on BOS."""
    INSTRUCTION = 2
    POST_INSTRUCTION = 3
    """Template tokens between the user's words and the answer."""
    RESPONSE = 4


SCORED_REGIONS = (Region.INSTRUCTION, Region.POST_INSTRUCTION)
"""Where features are scored and selected: never on BOS, headers or padding."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """One conversation as tokens. `regions[i]` is the `Region` of `ids[i]`; exactly one BOS, if the model has one."""

    prompt_id: str
    ids: tuple[int, ...]
    regions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_post_instruction(self) -> int:
        return self.regions.count(Region.POST_INSTRUCTION)


Items = Sequence[TokenizedPrompt]


@dataclass(frozen=True)
class Batch:
    """Left-padded conversations. Row `b` belongs to prompt `prompt_ids[b]`."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]
    regions: Int[Tensor, "batch pos"]
    prompt_ids: tuple[str, ...]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """True at tokens."""
        return self.attention_mask.bool()

    def within(self, regions: Sequence[Region]) -> Bool[Tensor, "batch pos"]:
        """True at tokens of the given regions."""
        return torch.isin(self.regions, torch.tensor(regions, device=self.regions.device))

    def repeat(self, times: int) -> Batch:
        """The whole batch, copy after copy."""
        return self._each(lambda tensor: tensor.repeat(times, 1), self.prompt_ids * times)

    def rows(self, indices: Sequence[int]) -> Batch:
        """Some of its rows, padded as they are."""
        return self._each(lambda tensor: tensor[list(indices)], tuple(self.prompt_ids[n] for n in indices))

    def cut(self, indices: Sequence[int]) -> Batch:
        """Some of its rows as a batch of their own: without the padding that all of them have."""
        rows = self.rows(indices)
        start = int(rows.attention_mask.sum(1).max())
        return rows._each(lambda tensor: tensor[:, -start:], rows.prompt_ids)

    def _each(self, change: Callable[[Tensor], Tensor], prompt_ids: tuple[str, ...]) -> Batch:
        tensors = (self.input_ids, self.attention_mask, self.position_ids, self.regions)
        return Batch(*map(change, tensors), prompt_ids=prompt_ids)


def pad(items: Items, *, pad_id: int, device: torch.device) -> Batch:
    """Stack conversations into one left-padded batch; positions count from each conversation's first token."""
    width = max(map(len, items))

    def stacked(rows: Iterable[Sequence[int]], fill: int) -> Int[Tensor, "batch pos"]:
        return torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows], device=device)

    mask = stacked(([1] * len(item) for item in items), 0)
    return Batch(
        input_ids=stacked((item.ids for item in items), pad_id),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        regions=stacked((item.regions for item in items), Region.PAD),
        prompt_ids=tuple(item.prompt_id for item in items),
    )


class ChatFormat:
    """Renders one user message through the tokenizer's chat template, once, and tokenises it, once. The date is pinned,
    thinking mode is off where the template knows it, and the generation prompt is added. A `ModelError` refuses
    tokenizers without chat template or offsets, and templates that alter messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str, system_prompt: str | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                f"{name} has no chat template, so it is probably a base model; demur studies chat models. Use the "
                "instruction-tuned version, or set the tokenizer's chat_template"
            )
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer of {name} ({type(tokenizer).__name__}) gives no character offsets, which demur needs "
                "to tell the user's words from the template; use the fast version"
            )
        self.name = name
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        # One prompt is asked many times, under one change after another.
        self._located = lru_cache(_REMEMBERED)(self._locate)

    def _template(self, message: str) -> str:
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        try:
            text = self.tokenizer.apply_chat_template(
                [*system, {"role": "user", "content": message}],
                chat_template=self._dated_template,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
                thinking=False,
                date_string=PINNED_DATE.strftime("%d %b %Y"),
            )
        except Exception as error:  # jinja raises its own kinds, and templates raise what they like
            hint = " (it may not take a system message)" if system else ""
            raise ModelError(f"the chat template of {self.name} failed{hint}: {error}") from error
        return str(text)

    @cached_property
    def _dated_template(self) -> str:
        """The chat template with the clock it may ask (`strftime_now`) stopped at the pinned date."""
        template = str(self.tokenizer.get_chat_template())
        formats = dict.fromkeys(_CLOCK.findall(template))
        if not formats:
            return template
        # Only data may be handed to a template, so the clock is a macro that knows the formats that are asked for.
        cases = "".join(
            f"{{%- if format == {wanted!r} -%}}{PINNED_DATE.strftime(wanted)}{{%- endif -%}}" for _, wanted in formats
        )
        return f"{{%- macro strftime_now(format) -%}}{cases}{{%- endmacro -%}}{template}"

    @cached_property
    def _frame(self) -> tuple[str, str]:
        before, mark, after = self._template(_MARK).partition(_MARK)
        if not mark or _MARK in after:
            raise ModelError(f"the chat template of {self.name} does not show the user's message exactly once")
        return before, after

    def text(self, message: str) -> tuple[str, int, int]:
        """The rendered prompt, and where the message, perhaps trimmed, begins and ends in it (characters)."""
        before, after = self._frame
        rendered = self._template(message)
        for shown in (message, message.strip(), message.rstrip(), message.lstrip()):
            if rendered == before + shown + after:
                return rendered, len(before), len(before) + len(shown)
        raise ModelError(
            f"the chat template of {self.name} alters the message {message[:60]!r}, so its words cannot be located"
        )

    @cached_property
    def bos_id(self) -> int | None:
        """The BOS that every sequence must begin with, once: None for models that use none."""
        bos = self.tokenizer.bos_token_id
        if not isinstance(bos, int):
            return None
        by_template = self.tokenizer(self._frame[0], add_special_tokens=False)["input_ids"]
        by_tokenizer = self.tokenizer("a")["input_ids"]
        return bos if bos in (by_template[:1] + by_tokenizer[:1]) else None

    def tokenize(self, prompt: Prompt | str, response: str | None = None) -> TokenizedPrompt:
        """The user's message (a plain text gets the id "0") in the template, and an answer without its end of turn."""
        (prompt,) = as_prompts([prompt])
        tokens = [(token, region) for token, region, _ in self._located(prompt.text)]
        if self.bos_id is not None:
            tokens = [(self.bos_id, Region.SPECIAL), *dropwhile(lambda token: token[0] == self.bos_id, tokens)]
        if response is not None:
            answer = self.tokenizer(response, add_special_tokens=False)["input_ids"]
            tokens += [(token, Region.RESPONSE) for token in answer]
        return TokenizedPrompt(prompt.id, tuple(token for token, _ in tokens), tuple(int(part) for _, part in tokens))

    def ends(self, message: str) -> tuple[int, ...]:
        """Of each of the message's tokens, the place in the message of the last character that it holds."""
        text, start, end = self.text(message)
        trimmed = message.index(text[start:end])
        inside = (right for _, region, right in self._located(message) if region == Region.INSTRUCTION)
        return tuple(min(right, end) - start - 1 + trimmed for right in inside)

    def _locate(self, message: str) -> list[tuple[int, Region, int]]:
        """Tokens of the rendered prompt, with their regions and where they end in it."""
        text, start, end = self.text(message)

        def region(left: int, right: int) -> Region:
            # A token that straddles a border belongs to the message: it carries some of its words.
            if left < end and right > start and right > left:
                return Region.INSTRUCTION
            return Region.SPECIAL if right <= start else Region.POST_INSTRUCTION

        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [(token, region(*span), span[1]) for token, span in spans]
