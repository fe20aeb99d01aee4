"""Tiny random models of the real classes, with tokenizers of the families' kinds, made offline at once.

Their answers mean nothing. What is real is everything around the arithmetic: the classes and their configurations
(soft-capping, sliding windows, grouped heads, tied embeddings, rotary variants), where the decoder layers sit, special
tokens, templates, padding sides, generation defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

from demur.errors import InputError
from demur.testing._tokenizers import PICTURES
from demur.testing._tokenizers import tokenizer as _tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Family = Literal["gemma2", "gemma3", "gemma3_multimodal", "llama3", "qwen2.5", "qwen3"]
FAMILIES: tuple[Family, ...] = get_args(Family)

SLIDING_WINDOW = 16
"""Tokens that a sliding-window layer of the tiny Gemmas sees: fewer than most prompts have in their template."""

# Head width is not d_model / heads in Gemma.
_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": SLIDING_WINDOW}

_FINAL_GAIN = 6.0  # spread of the logits: the final norm's weight is about this


def tiny_model(
    family: Family, *, seed: int = 0, n_layers: int = 4, d_model: int = 32, context: int = 512
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random model of `family` and its tokenizer, in float32 on the CPU, in evaluation mode.

    Weights are scaled so that every block matters and different prompts get different next tokens. Equal arguments give
    equal weights; the global random state is left alone.

    Args:
        family: the real family to imitate.
        seed: of the weights.
        n_layers: decoder layers.
        d_model: width of the residual stream, a multiple of 8.
        context: longest sequence that the configuration admits, tokens.

    Raises:
        InputError: unknown family, or `d_model` is not a multiple of 8.
    """
    if family not in FAMILIES:
        raise InputError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    if d_model % 8:
        raise InputError(f"d_model = {d_model} is not a multiple of 8, which four heads of even width need")
    tokenizer = _tokenizer(family)
    # Building a model draws weights from the global generator; `_randomise` overwrites them.
    with cast("Any", torch.random).fork_rng(devices=[]):
        model = _build(family, tokenizer, n_layers=n_layers, d_model=d_model, context=context)
    _randomise(model, seed=seed, zero_centred_norms=family.startswith("gemma"))
    # Rows beyond the vocabulary (Qwen pads its embedding) never win: their logit is 0.
    with torch.no_grad():
        cast("Any", model.get_input_embeddings()).weight[len(tokenizer) :] = 0.0
    model.generation_config = _generation_defaults(family, tokenizer)
    return model.eval(), tokenizer


def save_tiny(family: Family, folder: str | Path, **options: int) -> Path:
    """Write `tiny_model(family, **options)` as a folder for `AutoModelForCausalLM` and `AutoTokenizer`; returns it."""
    for part in tiny_model(family, **options):
        cast("Any", part).save_pretrained(folder)
    return Path(folder)


def _build(
    family: Family, tokenizer: PreTrainedTokenizerBase, *, n_layers: int, d_model: int, context: int
) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    match family:
        case "gemma2":
            gemma2 = Gemma2Config(**shape, **_GEMMA)
            cast("Any", gemma2)._attn_implementation = "eager"  # the attention that applies the soft cap
            return Gemma2ForCausalLM(gemma2)
        case "gemma3":
            return Gemma3ForCausalLM(Gemma3TextConfig(**_gemma3_text(shape)))
        case "gemma3_multimodal":
            return Gemma3ForConditionalGeneration(_gemma3_multimodal(shape, tokenizer))
        case "llama3":
            rope = {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context // 8,
            }
            return LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope, tie_word_embeddings=False))
        case "qwen2.5":
            return Qwen2ForCausalLM(Qwen2Config(**_qwen(shape)))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**_qwen(shape), head_dim=16))


def _gemma3_text(shape: dict[str, Any]) -> dict[str, Any]:
    """Sliding windows in all layers but the last (the real pattern is five to one)."""
    sliding = ["sliding_attention"] * (shape["num_hidden_layers"] - 1)
    return shape | _GEMMA | {"layer_types": [*sliding, "full_attention"]}


def _gemma3_multimodal(shape: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Gemma3Config:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        vision_use_head=False,
    )
    begin, end, soft = cast("list[int]", tokenizer.convert_tokens_to_ids(PICTURES))
    return Gemma3Config(
        text_config=_gemma3_text(shape),
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=begin,
        eoi_token_index=end,
        image_token_index=soft,
    )


def _qwen(shape: dict[str, Any]) -> dict[str, Any]:
    """Qwen's embedding is longer than its vocabulary; its configuration names a BOS that its tokenizer lacks."""
    return shape | {
        "vocab_size": -(-shape["vocab_size"] // 64) * 64,
        "bos_token_id": shape["pad_token_id"],
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    }


@torch.no_grad()
def _randomise(model: PreTrainedModel, *, seed: int, zero_centred_norms: bool) -> None:
    """Overwrite every parameter, in name order, so that blocks, norms, biases and positions all matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        text_norm = "norm" in name and "vision" not in name
        if name.endswith("bias"):
            weight.copy_(0.2 * noise)
        elif weight.ndim == 1:
            centre = 0.0 if text_norm and zero_centred_norms else 1.0
            weight.copy_(centre + 0.2 * noise)
        elif "embed" in name or "lm_head" in name:
            weight.copy_(0.5 * noise / weight.shape[-1] ** 0.5)
        else:
            # Query weights twice as large: attention that is neither uniform nor one-hot.
            scale = 2.0 if "q_proj" in name else 1.0
            weight.copy_(scale * noise / weight[0].numel() ** 0.5)
    cast("Any", model.get_decoder()).norm.weight.add_(_FINAL_GAIN - 1.0)


_SAMPLING: dict[Family, dict[str, Any]] = {
    "gemma2": {},
    "gemma3": {"do_sample": True, "top_k": 64, "top_p": 0.95},
    "gemma3_multimodal": {"do_sample": True, "top_k": 64, "top_p": 0.95},
    "llama3": {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    "qwen2.5": {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    "qwen3": {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
}
_ENDS = {
    "llama3": ["<|eot_id|>", "<|end_of_text|>"],
    "qwen2.5": ["<|im_end|>", "<|endoftext|>"],
    "qwen3": ["<|im_end|>", "<|endoftext|>"],
}
"""Of a turn and of a text; the Gemmas have `<end_of_turn>` and `<eos>`."""


def _generation_defaults(family: Family, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """As in the real checkpoints: all but Gemma 2 sample by default, Qwen 2.5 penalises repeats as well."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(_ENDS.get(family, ["<end_of_turn>", "<eos>"])),
        **_SAMPLING[family],
    )
