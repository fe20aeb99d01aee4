"""Small tokenizers of the real families' kinds, trained on a few sentences, without any download."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from demur.testing import _templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from demur.testing._tiny_models import Family

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
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_TURN = ["<start_of_turn>", "<end_of_turn>"]
PICTURES = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]


def tokenizer(family: Family) -> PreTrainedTokenizerBase:
    """The family's tokenizer in small: its class, special tokens, padding side, BOS habit and chat template.

    Any text encodes, and decodes to itself (Qwen's normalises to NFC, as the real one does).
    """
    match family:
        case "gemma2":
            return _gemma(_templates.GEMMA2, _TURN)
        case "gemma3":
            return _gemma(_templates.GEMMA3, _TURN)
        case "gemma3_multimodal":
            return _gemma(_templates.GEMMA3, [*_TURN, *PICTURES])
        case "llama3":
            return _llama3()
        case "qwen2.5":
            return _qwen(_templates.QWEN25)
        case "qwen3":
            result = _qwen(_templates.QWEN3)
            # Added but not special, so that decoding keeps them, as in the real vocabulary.
            result.add_tokens(["<think>", "</think>"])
            return result


def _gemma(template: str, markers: Sequence[str]) -> GemmaTokenizer:
    vocab, merges = _character_level(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *markers))
    # The real one adds BOS when it encodes, and its template writes BOS as well.
    result = GemmaTokenizer(
        vocab=dict(vocab), merges=cast("Any", merges), add_bos_token=True, extra_special_tokens=list(markers)
    )
    result.chat_template = template
    return result


def _llama3() -> PreTrainedTokenizerFast:
    vocab, merges = _byte_level()
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    # Llama 3 declares no padding token and pads, when told which to use, on the right.
    result = byte_level_tokenizer(
        vocab, merges, _WORDS, names, bos_token=names[0], eos_token=names[-1], padding_side="right"
    )
    result.chat_template = _templates.LLAMA3
    return result


def _qwen(template: str) -> Qwen2Tokenizer:
    vocab, merges = _byte_level()
    result = Qwen2Tokenizer(
        vocab=dict(vocab),
        merges=cast("Any", merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=cast("Any", None),
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="right",
    )
    result.chat_template = template
    return result


def byte_level_tokenizer(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    words: str,
    specials: Sequence[str],
    *,
    bos_token: str,
    **declared: Any,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS before what it encodes.

    Args:
        vocab: piece → id.
        merges: pairs of pieces, in order.
        words: regular expression that cuts text into words.
        specials: special tokens.
        bos_token: the one that begins a text.
        declared: what the tokenizer declares besides: `eos_token`, `pad_token`, `padding_side`.
    """
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


_Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]


@lru_cache(maxsize=1)
def _byte_level() -> _Vocabulary:
    """Vocabulary and merges of a byte-level BPE: 256 bytes, then merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + _N_MERGES, initial_alphabet=alphabet, show_progress=False)
    return _trained(_byte_level_words(_WORDS), trainer, _SENTENCES)


@lru_cache(maxsize=2)
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
