"""Greedy decoding that does little twice: rows that have ended leave the batch, and guessed tokens are checked several
at a pass (speculative decoding, Leviathan et al. 2023). It writes what `generate` of transformers writes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from demur.model._resources import by_length, next_batch, padding_budget

if TYPE_CHECKING:
    from demur.model._chat_format import Batch
    from demur.model._chat_model import ChatModel

Tokens = Sequence[int]

_LOGITS_BYTES: Final = 2**29
"""What the logits of one pass may hold beyond one token a row."""
_WORTHWHILE: Final = 0.5
"""Share of a pass's slots that must hold a token or a guess: a slot of padding costs as much as a token."""
_FIRST_GUESSES: Final = 4
"""Guesses that a row's draft may make at once; twice as many each time that all of them were right."""
_COMPACT: Final = 0.75
"""Share of a batch's rows at which those that have ended are taken out."""


def decode_greedily(
    model: ChatModel, batch: Batch, max_new_tokens: int, drafts: Sequence[Sequence[Tokens]] = ()
) -> list[list[int]]:
    """Tokens of each row's answer: up to the end of the model's turn, that included, or to the limit. Interventions
    that are open act; call it without gradients.

    Args:
        model: the chat model.
        batch: conversations to continue.
        max_new_tokens: limit on an answer's length.
        drafts: for each row, answers that it may well give, the likeliest last. They only save passes: a token is kept
            where the model itself would have written it.
    """
    return _Decoding(model, batch, max_new_tokens, drafts or [()] * len(batch)).run()


class _Decoding:
    """A batch on its way. `batch`, the cache and the mask hold the rows `places` of the batch that came in. Slots of
    guesses that were not kept are masked, and leave the cache where no row has kept one after them."""

    def __init__(self, model: ChatModel, batch: Batch, max_new_tokens: int, drafts: Sequence[Sequence[Tokens]]) -> None:
        self.model = model
        self.limit = max_new_tokens
        self.drafts = drafts
        self.written: list[list[int]] = [[] for _ in range(len(batch))]
        self.trust = [_FIRST_GUESSES] * len(batch)
        self.lengths: list[int] = batch.attention_mask.sum(1).tolist()
        self.places = by_length(self.lengths)
        self.batch = batch.rows(self.places)
        self.mask = self.batch.attention_mask
        self.ends = frozenset(model.eos_ids)
        self.cache: Any = None
        self.free = False
        """Whether slots may be masked and dropped: no layer has a window that they could fill, or anything but keys."""

    def run(self) -> list[list[int]]:
        self._begin()
        while live := [row for row, place in enumerate(self.places) if not self._ended(place)]:
            if len(live) <= _COMPACT * len(self.places) and _keeps_slots(self.cache):
                self._keep(live)
            self._step(self._guesses())
        return self.written

    def _begin(self) -> None:
        """Write each row's first token. Prompts of like length are read together, for a slot of padding costs as much
        as a token; then the keys and values of all are put side by side."""
        parts = self._parts()
        read = [self._read(part) for part in parts[:1]]
        self.free = self._within_window(0) and _keeps_slots(read[0][1])
        if not self.free and len(parts) > 1:
            parts, read = [self.batch], [self._read(self.batch)]
        read += [self._read(part) for part in parts[1:]]
        tokens, caches = zip(*read, strict=True)
        self.cache = _joined(caches, self.mask.shape[1]) if self.free else caches[0]
        for place, token in zip(self.places, chain(*tokens), strict=True):
            self.written[place].append(token)

    def _parts(self) -> list[Batch]:
        """The batch in parts that are read together: all of it where layers have a window that slots could leave."""
        if not self._within_window(0):
            return [self.batch]
        lengths, start = [self.lengths[place] for place in self.places], 0
        parts: list[Batch] = []
        most, padding = self.model.budgets.plain, padding_budget(self.model.device)
        while start < len(lengths):
            rows = next_batch(lengths, range(start, len(lengths)), most, padding)
            parts.append(self.batch.cut(rows))
            start += len(rows)
        return parts

    def _read(self, part: Batch) -> tuple[list[int], Any]:
        """The first token of each row of a part, and the part's cache."""
        found, cache = self._pass(part, part.input_ids, part.position_ids, part.attention_mask, None, keep=1)
        return [token for (token,) in found], cache

    def _ended(self, place: int) -> bool:
        written = self.written[place]
        return len(written) >= self.limit or written[-1] in self.ends

    def _step(self, guesses: list[Tokens]) -> None:
        """One pass over each row's last token and its guesses: keep those that the model agrees with, and what it
        writes after them."""
        width, before = 1 + max(map(len, guesses)), self.mask.shape[1]
        last = [self.written[place][-1] for place in self.places]
        rows = [[token, *guess] for token, guess in zip(last, guesses, strict=True)]
        ids = _stacked([row + [self.model.pad_id] * (width - len(row)) for row in rows], self.mask)
        # The last token that is written stands at the place after the prompt and the tokens before it.
        starts = [self.lengths[place] + len(self.written[place]) - 1 for place in self.places]
        positions = _stacked([[start + n for n in range(width)] for start in starts], self.mask)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        found, self.cache = self._pass(self.batch, ids, positions, self.mask, self.cache, keep=width)
        most = 0
        for row, (place, tokens) in enumerate(zip(self.places, found, strict=True)):
            kept = 0
            if not self._ended(place):
                kept = self._accept(place, guesses[row], tokens)
                self.trust[place] = 2 * self.trust[place] if kept == len(guesses[row]) > 0 else _FIRST_GUESSES
            self.mask[row, before + 1 + kept :] = 0
            most = max(most, kept)
        if most + 1 < width:
            self.cache.crop(most + 1 - width)
            self.mask = self.mask[:, : before + 1 + most]

    def _accept(self, place: int, guess: Tokens, tokens: Tokens) -> int:
        """Write the model's tokens as far as the guess that led to them is its own; how many guesses were."""
        for n, token in enumerate(tokens):
            self.written[place].append(token)
            if self._ended(place) or n == len(guess) or token != guess[n]:
                return n
        return len(guess)

    def _guesses(self) -> list[Tokens]:
        """For each row, how a draft that agrees with all that is written goes on; cut where that fills a pass."""
        none: list[Tokens] = [()] * len(self.places)
        if not self.free:
            return none
        found = [self._guess(place) for place in self.places]
        widest = _LOGITS_BYTES // (len(found) * self.model.vocabulary * self.model.dtype.itemsize)
        for width in sorted({min(len(guess), widest) for guess in found if guess}, reverse=True):
            used = sum(1 + min(len(guess), width) for guess in found)
            if used >= _WORTHWHILE * len(found) * (1 + width) and self._within_window(width):
                return [guess[:width] for guess in found]
        return none

    def _guess(self, place: int) -> Tokens:
        written = self.written[place]
        if self._ended(place):
            return ()
        fitting = (draft for draft in reversed(self.drafts[place]) if list(draft[: len(written)]) == written)
        stop = min(self.limit - 1, len(written) + self.trust[place])
        return next((draft[len(written) : stop] for draft in fitting if len(draft) > len(written)), ())

    def _within_window(self, width: int) -> bool:
        """Whether slots, those of dropped guesses among them, stay within the window of layers that have one: it counts
        slots, not tokens."""
        config = self.model.hf.config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None)
        shortest = min(len(self.written[place]) for place in self.places)
        return not window or self.mask.shape[1] + 1 + width + self.limit - shortest < window

    def _keep(self, rows: Sequence[int]) -> None:
        """Go on with some rows only."""
        chosen = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(chosen)
        self.mask = self.mask[chosen]
        self.batch = self.batch.rows(rows)
        self.places = [self.places[row] for row in rows]

    def _pass(
        self,
        batch: Batch,
        ids: Int[Tensor, "batch pos"],
        positions: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch slot"],
        cache: Any,
        keep: int,
    ) -> tuple[list[list[int]], Any]:
        """The model's next token after each of the last `keep` tokens, and the cache with all of `ids`."""
        options: dict[str, Any] = {"logits_to_keep": keep} if self.model.keeps_logits else {}
        with self.model.serving(batch):
            output = cast("Any", self.model.hf)(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **options,
            )
        return output.logits[:, -keep:].argmax(-1).tolist(), output.past_key_values


def _keeps_slots(cache: Any) -> bool:
    """Whether a cache keeps keys and values of every slot, so that rows can be taken out and slots masked."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", ())
    return bool(layers) and all(isinstance(layer, DynamicLayer) for layer in layers)


def _joined(caches: Sequence[Any], width: int) -> Any:
    """Caches of parts of a batch as one, every row padded on its left to `width` slots. Its layers have no window."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    joined = DynamicCache()
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer = DynamicLayer()
        joined.layers.append(layer)
        if layers[0].is_initialized:  # Not so where a layer uses another one's.
            keys, values = ([getattr(part, each) for part in layers] for each in ("keys", "values"))
            layer.update(_padded(keys, width), _padded(values, width))
    return joined


def _padded(parts: Sequence[Float[Tensor, "_ head _ d"]], width: int) -> Float[Tensor, "row head slot d"]:
    return torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])


def _stacked(rows: list[list[int]], like: Tensor) -> Int[Tensor, "batch pos"]:
    return torch.tensor(rows, dtype=like.dtype, device=like.device)
