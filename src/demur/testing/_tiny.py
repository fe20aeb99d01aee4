"""Tiny random models of the real classes, with tokenizers of the families' kinds and SAEs that fit, made offline.

Their answers mean nothing; everything around the arithmetic is real: classes and configurations (soft-capping, sliding
windows, grouped heads, tied embeddings, rotary variants), special tokens, templates, padding, generation defaults.
Templates keep the traits that trip code up: Gemma and Llama 3 write BOS into the text, which their tokenizers add as
well; Gemma 2 refuses a system message, Gemma 3 prepends it to the user's first one; Llama 3 writes today's date unless
`date_string` is given; Qwen 2.5 inserts a system message; Qwen 3 ends in an empty thought if `enable_thinking` is off.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from demur.errors import InputError
from demur.model import capture
from demur.saes import ActivationName, DenseSae, Suite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Family = Literal["gemma2", "gemma3", "gemma3_multimodal", "llama3", "qwen2.5", "qwen3"]
FAMILIES: tuple[Family, ...] = get_args(Family)

SLIDING_WINDOW = 16
"""Tokens that a sliding-window layer of the tiny Gemmas sees: fewer than most prompts have in their template."""

_DATA = Path(__file__).parent / "data"
_FINAL_GAIN = 6.0  # spread of the logits: the final norm's weight is about this


def tiny_model(
    family: Family, *, seed: int = 0, n_layers: int = 4, d_model: int = 32, context: int = 512
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random model of `family` and its tokenizer, in float32 on the CPU, in evaluation mode.

    Weights are scaled so that every block matters and different prompts get different next tokens. Equal arguments give
    equal weights; the global random state is left alone. `n_layers` are decoder layers, `d_model` the width of the
    residual stream, `context` the tokens of the longest sequence. Raises InputError: unknown family, or `d_model` is
    not a multiple of 8."""
    if family not in FAMILIES:
        raise InputError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    if d_model % 8:
        raise InputError(f"d_model = {d_model} is not a multiple of 8, which four heads of even width need")
    traits: dict[str, Any] = tomllib.loads((_DATA / "families.toml").read_text(encoding="utf-8"))[family]
    tokenizer = tokenizer_of(family)
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"num_hidden_layers": n_layers, "hidden_size": d_model, "max_position_embeddings": context}
    # Building a model draws weights from the global generator; `_randomise` overwrites them.
    with cast("Any", torch.random).fork_rng(devices=[]):
        config = _config(traits, {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **ids, **sizes})
        model: PreTrainedModel = cast("Any", AutoModelForCausalLM).from_config(config)
    _randomise(model, seed=seed, zero_centred_norms=family.startswith("gemma"))
    # Rows beyond the vocabulary (Qwen pads its embedding) never win: their logit is 0.
    with torch.no_grad():
        cast("Any", model.get_input_embeddings()).weight[len(tokenizer) :] = 0.0
    ends = tokenizer.convert_tokens_to_ids(traits["ends"])
    model.generation_config = GenerationConfig(**ids, eos_token_id=ends, **traits["generation"])
    return model.eval(), tokenizer


def _config(traits: dict[str, Any], given: dict[str, Any]) -> PreTrainedConfig:
    """The traits of a family with the ids and sizes given, and what follows from these."""
    text = given | {"intermediate_size": 2 * given["hidden_size"], "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= traits["config"]
    if traits["model_type"] == "llama":
        text["rope_parameters"]["original_max_position_embeddings"] = given["max_position_embeddings"] // 8
    elif traits["model_type"].startswith("gemma3"):  # The real pattern is five to one.
        text["layer_types"] = ["sliding_attention"] * (given["num_hidden_layers"] - 1) + ["full_attention"]
    whole = {"text_config": text, **traits["pictures"]} if "pictures" in traits else text
    return cast("Any", AutoConfig).for_model(traits["model_type"], **whole)


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a family in small, or of the planted model: `recipes/testing.py` trained them. Class, special
    tokens, padding side, BOS habit and chat template are the family's. Any text encodes, and decodes to itself (Qwen's
    normalises to NFC, as the real one does)."""
    return cast("Any", AutoTokenizer).from_pretrained(_DATA / name)


def save_tiny(family: Family, folder: str | Path, **options: int) -> Path:
    """Write `tiny_model(family, **options)` as a folder for `AutoModelForCausalLM` and `AutoTokenizer`; returns it."""
    for part in tiny_model(family, **options):
        cast("Any", part).save_pretrained(folder)
    return Path(folder)


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


_RATE = 0.1  # fraction of tokens at which a feature fires
_TOKENS = (16, 32)  # sequences, and tokens of each, that the thresholds are set on


@torch.no_grad()
def tiny_suite(
    model: PreTrainedModel, *, d_sae: int = 64, seed: int = 0, activation: ActivationName = "jumprelu"
) -> Suite:
    """A random SAE for every decoder layer of `model`, whose features fire at about one token in ten.

    Thresholds (or biases) are set on the model's residuals over random tokens, the first of each sequence left out.
    Decoder rows are unit vectors near their encoder columns, as in trained SAEs. `seed`: of tokens and weights.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab: int = cast("Any", model.config).get_text_config().vocab_size
    ids = torch.randint(vocab, _TOKENS, generator=generator).to(model.device)
    with capture(tuple(cast("Any", model.get_decoder()).layers)) as residuals:
        model(input_ids=ids, use_cache=False)
    k = max(1, round(_RATE * d_sae)) if activation == "topk" else None
    saes: dict[int, DenseSae] = {}
    for layer in sorted(residuals):
        residual: Float[Tensor, "token d_model"] = residuals[layer][:, 1:].flatten(0, 1).float().cpu()
        mean, d_model = residual.mean(0), residual.shape[1]
        w_enc = torch.nn.functional.normalize(torch.randn(d_model, d_sae, generator=generator), dim=0)
        noise = torch.randn(d_sae, d_model, generator=generator) / d_model**0.5
        w_dec = torch.nn.functional.normalize(w_enc.T + noise, dim=-1)
        b_enc = -(mean @ w_enc)
        edge = (residual @ w_enc + b_enc).quantile(1 - _RATE, dim=0)
        b_enc = b_enc - edge if activation == "relu" else b_enc
        saes[layer] = DenseSae(layer, w_enc, b_enc, edge if activation == "jumprelu" else None, w_dec, k, b_dec=mean)
    return Suite.from_dense(saes)
