"""How the files of `demur.testing` were made: `python -m recipes.testing FOLDER` writes them anew.

Small tokenizers of the real families' kinds, trained on a few sentences without any download, and the planted model's
tokenizer and prompts, from its words (`words.toml`).
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

import demur
from demur.testing import FAMILIES, Family
from demur.types import Label, Prompt

INSTALLED = Path(demur.__file__).parent / "testing" / "data"

# What the merges are learned from: everyday words, so that words are one to three tokens.
_SENTENCES = (
    "Tell me how to bake bread for a friend. Explain how to plan a quiet garden in the spring.",
    "Write a short story about a train that is always late. How do I learn to play the guitar?",
    "What is the best way to clean a window, and why does it work? Give me a list of three steps.",
    "Sure, here is what you need: take your time, read the plan twice, then begin.",
    "I cannot help with that. I'm sorry, but I can't do it; it could hurt people.",
    "Describe the weather in one sentence. Translate this letter. Summarise the text below.",
    "user model assistant system You are a helpful assistant. Cutting Knowledge Date: December 2023",
)
_N_MERGES = 200

# How Llama 3 cuts text before byte-level BPE: words with their leading space, digits, punctuation, line ends.
_LLAMA_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PLANTED_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]|\s+"

_TURN = ["<start_of_turn>", "<end_of_turn>"]
_PICTURES = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]

_Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]


def write_files(folder: Path) -> None:
    """Write every tokenizer with its chat template, and the planted prompts, as they are installed."""
    for family in FAMILIES:
        _save(family_tokenizer(family), family, folder)
    _save(planted_tokenizer(), "planted", folder)
    for name, rows in planted_rows().items():
        lines = (prompt.model_dump_json() + "\n" for prompt in _prompts(name, rows))
        (folder / "planted" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _save(tokenizer: PreTrainedTokenizerBase, name: str, folder: Path) -> None:
    tokenizer.chat_template = (INSTALLED / name / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder / name)


def family_tokenizer(family: Family) -> PreTrainedTokenizerBase:
    """The family's tokenizer in small: its class, special tokens, padding side and BOS habit."""
    match family:
        case "gemma2" | "gemma3":
            return _gemma(_TURN)
        case "gemma3_multimodal":
            return _gemma([*_TURN, *_PICTURES])
        case "llama3":
            return _llama3()
        case "qwen2.5":
            return _qwen()
        case "qwen3":
            result = _qwen()
            # Added but not special, so that decoding keeps them, as in the real vocabulary.
            result.add_tokens(["<think>", "</think>"])
            return result


def _gemma(markers: Sequence[str]) -> GemmaTokenizer:
    vocab, merges = _character_level(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *markers))
    # The real one adds BOS when it encodes, and its template writes BOS as well.
    return GemmaTokenizer(
        vocab=dict(vocab), merges=cast("Any", merges), add_bos_token=True, extra_special_tokens=list(markers)
    )


def _llama3() -> PreTrainedTokenizerFast:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    # Llama 3 declares no padding token and pads, when told which to use, on the right.
    return _byte_level_tokenizer(
        _byte_level(), _LLAMA_WORDS, names, names[0], eos_token=names[-1], padding_side="right"
    )


def _qwen() -> Qwen2Tokenizer:
    vocab, merges = _byte_level()
    return Qwen2Tokenizer(
        vocab=dict(vocab),
        merges=cast("Any", merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=cast("Any", None),
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="right",
    )


def _byte_level_tokenizer(
    vocabulary: _Vocabulary, words: str, specials: Sequence[str], bos_token: str, **declared: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS before what it encodes.

    Args:
        vocabulary: piece → id, and pairs of pieces in the order in which they merge.
        words: regular expression that cuts text into words.
        specials: special tokens.
        bos_token: the one that begins a text.
        declared: what the tokenizer declares besides: `eos_token`, `pad_token`, `padding_side`.
    """
    vocab, merges = vocabulary
    backend = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=True))
    backend.pre_tokenizer = _byte_level_words(words)
    backend.decoder = decoders.ByteLevel()
    cast("Any", backend).add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos_token}:0 $A:0",
        pair=f"{bos_token}:0 $A:0 {bos_token}:1 $B:1",
        special_tokens=[(bos_token, backend.token_to_id(bos_token))],
    )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos_token, model_input_names=names, **declared)


def _byte_level_words(words: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@lru_cache(maxsize=1)
def _byte_level() -> _Vocabulary:
    """Vocabulary and merges of a byte-level BPE: 256 bytes, then merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + _N_MERGES, initial_alphabet=alphabet, show_progress=False)
    return _trained(_byte_level_words(_LLAMA_WORDS), trainer, _SENTENCES)


def _character_level(reserved: tuple[str, ...]) -> _Vocabulary:
    """Vocabulary and merges of a BPE over characters, with byte fallback: reserved tokens, bytes, pieces."""
    base = [*reserved, *(f"<0x{value:02X}>" for value in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=len(base) + 60 + _N_MERGES, special_tokens=base, show_progress=False)
    words = pre_tokenizers.Split("▁", behavior="merged_with_next")
    return _trained(words, trainer, [sentence.replace(" ", "▁") for sentence in _SENTENCES])


def _trained(words: pre_tokenizers.PreTokenizer, trainer: trainers.Trainer, sentences: Sequence[str]) -> _Vocabulary:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = words
    backend.train_from_iterator(list(sentences), trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    return vocab, [(left, right) for left, right in model["merges"]]


# The planted model


_WORDS: dict[str, Any] = tomllib.loads((INSTALLED / "planted" / "words.toml").read_text(encoding="utf-8"))
_HARM: dict[str, tuple[list[str], list[str]]] = _WORDS["harm"]
_Row = tuple[str | None, str, str]
"""Type of harm, verb, thing."""


def planted_tokenizer() -> PreTrainedTokenizerFast:
    """One token per known word, bytes for everything else; adds BOS, pads on the left."""
    openings = [word for opening in _WORDS["openings"] for word in opening.split()]
    harm = [word for groups in _HARM.values() for group in groups for word in group]
    harmless = [*_WORDS["verbs"], *_WORDS["things"], *_WORDS["tail_words"]]
    words = dict.fromkeys((*openings, *_WORDS["function_words"], *harm, *harmless, "user", "model"))
    spaced = [form for word in words for form in (word, " " + word)]
    pieces = dict.fromkeys((*spaced, *_WORDS["refusal"], *_WORDS["compliance"]))
    reserved = ["<pad>", "<eos>", "<bos>", *_TURN]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = dict.fromkeys((*reserved, *alphabet, *(piece.replace(" ", "Ġ") for piece in pieces)))
    vocab = {name: number for number, name in enumerate(names)}
    declared = {"eos_token": "<end_of_turn>", "pad_token": "<pad>", "padding_side": "left"}
    return _byte_level_tokenizer((vocab, []), _PLANTED_WORDS, reserved, "<bos>", **declared)


def planted_rows() -> dict[str, list[_Row]]:
    """What the prompts of each set are about.

    Harmful: every verb with every thing of its type, types taking turns. Harmless: every harmless verb with every
    harmless thing. Over-refusal: one harm word beside a harmless one ("burn the bread"), which is answered.
    """
    verbs, things = _WORDS["verbs"], _WORDS["things"]
    harm_verbs = [verb for group, _ in _HARM.values() for verb in group]
    harm_things = [thing for _, group in _HARM.values() for thing in group]
    return {
        "harmful": [
            (category, verb, thing)
            for pairs in zip(*(product(*groups) for groups in _HARM.values()), strict=True)
            for category, (verb, thing) in zip(_HARM, pairs, strict=True)
        ],
        "harmless": [(None, verb, thing) for verb, thing in product(verbs, things)],
        "over-refusal": [
            *((None, verb, things[n % 8]) for n, verb in enumerate(harm_verbs)),
            *((None, verbs[n % 8], thing) for n, thing in enumerate(harm_things)),
        ],
    }


def _prompts(name: str, rows: Sequence[_Row]) -> Iterator[Prompt]:
    # Openings and tails run at strides of their own, so that no category has a wording of its own.
    openings, tails = _WORDS["openings"], _WORDS["tails"]
    label: Label = "harmful" if name == "harmful" else "harmless"
    for number, (category, verb, thing) in enumerate(rows):
        opening, tail = openings[(number + number // 4) % len(openings)], tails[number * 5 % len(tails)]
        text = f"{opening} {verb} the {thing}{tail}"
        yield Prompt(id=f"{name}-{number}", text=text, label=label, category=category, source="planted")


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))
