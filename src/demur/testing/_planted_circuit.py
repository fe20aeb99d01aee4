"""The planted model's weights: a Llama whose circuit is written down, not learned.

Everything is stated in a basis of named axes and then turned by one random rotation, so that no coordinate of the
residual but the first means anything by itself. Two devices make a real transformer block compute what is written:

- A constant of size `CONSTANT` on the first axis, which is not turned, dominates the norm of the residual: RMSNorm is
  the identity up to a factor within a few parts in a hundred thousand of 1. Real models have such an outlier coordinate
  too.
- The MLP's activation is ReLU and its up-projection reads the constant: unit j is `relu(w_j · x + b_j)`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).parent / "data" / "planted"
_LANGUAGE: dict[str, Any] = tomllib.loads((FOLDER / "words.toml").read_text(encoding="utf-8"))
REFUSAL: list[str] = _LANGUAGE["refusal"]
COMPLIANCE: list[str] = _LANGUAGE["compliance"]
CATEGORIES: dict[str, list[list[str]]] = _LANGUAGE["harm"]
"""Type of harm → two groups of words, verbs and things."""
_GROUPS = [group for groups in CATEGORIES.values() for group in groups]

_D_MODEL, _HEAD_DIM, _MLP_UNITS = 64, 16, 16  # as in config.json
CONSTANT = 1000.0
_WORDS = tuple(f"word{number}" for number in range(len(_GROUPS)))
HARM = tuple(f"harm{number}" for number in range(len(_GROUPS)))

# The first axes hold flags of tokens; those after the named ones hold words' identities.
_FLAGS = ("constant", "template", "content", "bos", "answer")
_NEXT = tuple(dict.fromkeys((*REFUSAL, *COMPLIANCE, "<end_of_turn>")))
_FEATURES = ("general0", "general1", "refuse", "aligned", "aftermath", "backup")
_AXES = (*_FLAGS, *_WORDS, *HARM, *_FEATURES, *(f"next:{piece}" for piece in _NEXT))
AXIS = {name: number for number, name in enumerate(_AXES)}
IDENTITY = slice(len(_AXES), _D_MODEL)

# The attention head: a template token gives each content word 1/SINK of the weight that it gives BOS.
SINK = 8.0
# Undoes the head's averaging in a prompt of three content words: with n of them each gets 1 / (n + SINK).
_MOVED = 3 + SINK
_STRONG = 12.0
_GATE = 50.0

SURE_LOGIT = 6.0
REFUSE_LOGIT = 6.0
_NEXT_LOGIT = 15.0
_OTHER_LOGIT = -6.0


def build(tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[LlamaForCausalLM, Float[Tensor, "axis d_model"]]:
    """The model, and where each named axis points in its residual stream (rows are orthonormal)."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.eye(_D_MODEL, dtype=torch.float64)
    square = torch.randn(_D_MODEL - 1, _D_MODEL - 1, generator=generator).double()
    basis[1:, 1:] = cast("Any", torch.linalg).qr(square).Q
    with cast("Any", torch.random).fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig.from_json_file(FOLDER / "config.json"))
    weights = _weights(tokenizer, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                weight, side = weights[name]
                parameter.copy_((weight @ basis if side == "reads" else basis.T @ weight).float())
            else:
                parameter.fill_(CONSTANT / _D_MODEL**0.5 if "norm" in name else 0.0)
    model.generation_config = GenerationConfig.from_pretrained(FOLDER)
    return model.eval(), basis.float()


def _weights(tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> dict[str, tuple[Tensor, str]]:
    """Parameter name → weight over named axes, and whether it reads (columns) or writes (rows) there."""
    weights = {
        "model.embed_tokens": _embedding(tokenizer, generator),
        "lm_head": _unembedding(tokenizer),
        **{f"model.layers.1.self_attn.{name}": weight for name, weight in _attention().items()},
    }
    for layer, units in enumerate(_units()):
        weights |= {f"model.layers.{layer}.mlp.{name}": weight for name, weight in _mlp(units).items()}
    sides = {"o_proj": "writes", "down_proj": "writes"}
    return {f"{name}.weight": (w, sides.get(name.split(".")[-1], "reads")) for name, w in weights.items()}


def _embedding(tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> Float[Tensor, "vocab axis"]:
    table = torch.zeros(len(tokenizer), _D_MODEL, dtype=torch.float64)
    identity = torch.randn(len(tokenizer), _D_MODEL - IDENTITY.start, generator=generator).double()
    table[:, IDENTITY] = torch.nn.functional.normalize(identity, dim=1)
    table[:, AXIS["constant"]] = CONSTANT

    def flag(pieces: Iterable[str], axis: str) -> None:
        for piece in pieces:
            table[token(tokenizer, piece), AXIS[axis]] = 1.0

    flag(["<bos>"], "bos")
    flag(["<start_of_turn>", "<end_of_turn>", "model", "user", "\n"], "template")
    flag([*REFUSAL, *COMPLIANCE], "answer")
    for word, group in zip(_WORDS, _GROUPS, strict=True):
        flag(_with_space(group), word)
    harmless = [*_LANGUAGE["verbs"], *_LANGUAGE["things"], *_LANGUAGE["tail_words"]]
    flag(_with_space([*harmless, *(word for group in _GROUPS for word in group)]), "content")
    flag(["\n"], f"next:{COMPLIANCE[0]}")
    for answer in (REFUSAL, COMPLIANCE):
        for piece, following in zip(answer, (*answer[1:], "<end_of_turn>"), strict=True):
            flag([piece], f"next:{following}")
    return table


def _with_space(words: Iterable[str]) -> list[str]:
    """Each word as it begins a text, and as it stands within one."""
    return [form for word in words for form in (word, " " + word)]


def _unembedding(tokenizer: PreTrainedTokenizerBase) -> Float[Tensor, "vocab axis"]:
    table = torch.zeros(len(tokenizer), _D_MODEL, dtype=torch.float64)
    table[:, AXIS["constant"]] = _OTHER_LOGIT / CONSTANT
    for piece in _NEXT:
        table[token(tokenizer, piece), AXIS[f"next:{piece}"]] = _NEXT_LOGIT - _OTHER_LOGIT
    sure, refuse = (token(tokenizer, answer[0]) for answer in (COMPLIANCE, REFUSAL))
    table[sure, AXIS[f"next:{COMPLIANCE[0]}"]] = SURE_LOGIT - _OTHER_LOGIT
    table[refuse, AXIS["constant"]] = 0.0
    table[refuse, AXIS["refuse"]] = REFUSE_LOGIT
    table[refuse, AXIS["backup"]] = REFUSE_LOGIT
    # Once the answer has begun it is never begun again, however far the refusal features are turned up.
    table[refuse, AXIS["answer"]] = -100.0 * REFUSE_LOGIT
    return table


def _attention() -> dict[str, Tensor]:
    """Layer 1's head: template tokens collect the content words' harm, everything else looks at BOS."""
    shape = (_HEAD_DIM, _D_MODEL)
    query, key, value, output = (torch.zeros(size, dtype=torch.float64) for size in (*[shape] * 3, shape[::-1]))
    to_bos, to_content = _HEAD_DIM // 2 - 1, _HEAD_DIM // 2 - 2  # the slowest rotary pairs, which see no position
    scale = _HEAD_DIM**0.5
    query[to_bos, AXIS["constant"]] = scale / CONSTANT
    key[to_bos, AXIS["bos"]] = _STRONG
    query[to_content, AXIS["template"]] = scale
    key[to_content, AXIS["content"]] = _STRONG - torch.log(torch.tensor(SINK)).item()
    for slot, name in enumerate((*HARM, "general0", "general1")):
        value[slot, AXIS[name]] = 1.0
        output[AXIS[name], slot] = _MOVED * (2.0 if name.startswith("harm") else 0.25)
    return {"q_proj": query, "k_proj": key, "v_proj": value, "o_proj": output}


Unit = tuple[Mapping[str, float], float, Mapping[str, float]]
"""One hidden unit: weights on named axes, bias, and what it writes per unit of its activation."""


def _units() -> list[list[Unit]]:
    """The MLPs, by layer. The harm that arrives at a template token adds up to about 2 per harm word."""
    detect: list[Unit] = [({word: 1.25}, -0.25, {harm: 1.0}) for word, harm in zip(_WORDS, HARM, strict=True)]
    # Any harm word, loudly: two features that nothing reads.
    general: list[Unit] = [(dict.fromkeys(_WORDS, 1.0), 0.0, {"general0": 3.0, "general1": 2.5})]

    def at_template(weights: Mapping[str, float], bias: float, written: Mapping[str, float]) -> Unit:
        return {**weights, "template": _GATE}, bias - _GATE, written

    half = dict.fromkeys(HARM, 0.5)
    decide = [
        at_template(half, -0.5, {"refuse": 1.0}),
        at_template(half, -3.0, {"refuse": -1.0}),
        at_template(half, -0.25, {"aligned": 1.5}),
    ]
    consequence = [at_template({"refuse": 1.0}, 0.0, {"aftermath": 1.25})]
    waits = {**half, "refuse": -2.0}
    backup = [at_template(waits, -0.75, {"backup": 1.0}), at_template(waits, -2.25, {"backup": -1.0})]
    return [[*detect, *general], decide, consequence, backup]


def _mlp(units: list[Unit]) -> dict[str, Tensor]:
    gate, up = (torch.zeros(_MLP_UNITS, _D_MODEL, dtype=torch.float64) for _ in range(2))
    down = torch.zeros(_D_MODEL, _MLP_UNITS, dtype=torch.float64)
    up[:, AXIS["constant"]] = 1.0 / CONSTANT
    for row, (read, bias, written) in enumerate(units):
        for name, weight in read.items():
            gate[row, AXIS[name]] = weight
        gate[row, AXIS["constant"]] += bias / CONSTANT
        for name, weight in written.items():
            down[AXIS[name], row] = weight
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


def token(tokenizer: PreTrainedTokenizerBase, piece: str) -> int:
    """The id of a piece that is one token of the planted vocabulary."""
    ids: list[int] = tokenizer(piece, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise AssertionError(f"{piece!r} is {len(ids)} tokens of the planted vocabulary, not one")
    return ids[0]
