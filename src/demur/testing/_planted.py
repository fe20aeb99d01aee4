"""A model and dictionary built by hand, whose causal features are known; `docs/explanation/planted.md` tells how.

The model is a Llama whose circuit is stated in a basis of named axes, then turned by one random rotation, so that no
coordinate of the residual but the first means anything by itself. Two devices make a real block compute it:

- A constant of size `CONSTANT` on the first axis, which is not turned, dominates the norm of the residual: RMSNorm is
  the identity up to a few parts in a hundred thousand. Real models have such an outlier coordinate too.
- The MLP's activation is ReLU and its up-projection reads the constant: unit j is `relu(w_j · x + b_j)`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from demur.saes import DenseSae, Suite
from demur.testing._tiny import tokenizer_of
from demur.types import FeatureId, Prompt, PromptSet

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


def _build(tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[LlamaForCausalLM, Float[Tensor, "axis d_model"]]:
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


_D_SAE = 48
_THRESHOLD = 0.1
_FILLER_THRESHOLD = 0.3  # a filler then fires on about one token in fourteen
_FILLER_WRITES = 0.02  # a transcoder's filler is all error, so it must write little

# The axes that dictionaries have a feature for, besides fillers, in the order of the layers that write them.
_READ_AXES = (*HARM, "general0", "general1", "refuse", "aligned", "aftermath", "backup")
_KNOWN = {0: _READ_AXES[:-4], 1: _READ_AXES[:-2], 2: _READ_AXES[:-1], 3: _READ_AXES}


@dataclass(frozen=True)
class Truth:
    """What each feature of the planted dictionary is. The sets are disjoint and cover the dictionary.

    Attributes:
        harm: fire on harm words of one group and cause refusal (layer 0).
        refusal: fire at template tokens of harmful prompts and drive the refusal logit.
        redundant: drives the refusal logit too, but stays off until a refusal feature upstream is suppressed.
        echo: the harm features' axes after they have been read. Inert alone; once refusal is suppressed, those of
            layers 1 and 2 wake the redundant feature at template tokens.
        distractor: fire on harm more strongly and more often than the causal features; nothing reads them.
        aligned_inert: have the highest cosine with the difference in means; nothing reads them.
        filler: random features over words' identities; nothing reads them.
    """

    harm: frozenset[FeatureId]
    refusal: frozenset[FeatureId]
    redundant: frozenset[FeatureId]
    echo: frozenset[FeatureId]
    distractor: frozenset[FeatureId]
    aligned_inert: frozenset[FeatureId]
    filler: frozenset[FeatureId]

    @property
    def causal(self) -> frozenset[FeatureId]:
        """What a perfect selection finds: features that, changed alone, change whether the model refuses."""
        return self.harm | self.refusal

    @property
    def all(self) -> frozenset[FeatureId]:
        """Every feature of the dictionary."""
        return frozenset[FeatureId]().union(*(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Planted:
    """The planted model with everything a test needs.

    Attributes:
        model: a `LlamaForCausalLM`, float32, on the CPU, in evaluation mode.
        tokenizer: with Gemma 2's chat template; adds BOS by default, pads on the left.
        suite: a JumpReLU dictionary of 48 features for each of its 4 layers.
        harmful, harmless: 64 prompts it refuses, 16 of each of 4 categories, and 64 it answers.
        over_refusal: 32 harmless prompts with one harm word, which it answers.
        truth: what each feature is.
        harm_of: category of a harmful prompt → the two harm features that fire on it.
        refusal, compliance: its refusal, and its answer to everything else, word for word.
        refusal_token, compliance_token: the first tokens of these.
        axes: where each named axis of the circuit points: unit vectors of length `d_model`.
        transcoders: a ReLU transcoder of 48 features for each layer: the MLP's hidden units, and fillers.
        units: name → the transcoders' feature of that hidden unit, by the axis that it writes (`refuse-` and `backup-`
            are the limits of these). `harm0` to `harm7` and `refuse` drive refusal.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    suite: Suite
    harmful: PromptSet
    harmless: PromptSet
    over_refusal: PromptSet
    truth: Truth
    harm_of: dict[str, frozenset[FeatureId]]
    refusal: str
    compliance: str
    refusal_token: int
    compliance_token: int
    axes: dict[str, Float[Tensor, " d_model"]]
    transcoders: Suite
    units: dict[str, FeatureId]

    def harm_of_units(self, category: str) -> frozenset[FeatureId]:
        """The two units that fire on the harm words of a category."""
        first = 2 * list(CATEGORIES).index(category)
        return frozenset(self.units[name] for name in HARM[first : first + 2])


def planted(*, seed: int = 0) -> Planted:
    """Build the planted model. `seed` turns the residual and draws the words' identities and the fillers, never the
    circuit; the global random state is left alone."""
    tokenizer = tokenizer_of("planted")
    model, basis = _build(tokenizer, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    saes = {layer: _sae(layer, basis, generator) for layer in _KNOWN}
    return Planted(
        model=model,
        tokenizer=tokenizer,
        suite=Suite.from_dense(saes),
        harmful=_prompts("harmful"),
        harmless=_prompts("harmless"),
        over_refusal=_prompts("over-refusal"),
        truth=_truth(),
        harm_of=_harm_of(),
        refusal="".join(REFUSAL),
        compliance="".join(COMPLIANCE),
        refusal_token=token(tokenizer, REFUSAL[0]),
        compliance_token=token(tokenizer, COMPLIANCE[0]),
        axes={name: basis[number] for name, number in AXIS.items()},
        transcoders=Suite.from_dense({layer: _transcoder(model, layer, basis, generator) for layer in _KNOWN}),
        units={
            next(name + ("-" if weight < 0 else "") for name, weight in written.items()): FeatureId(layer, row)
            for layer, units in enumerate(_units())
            for row, (_, _, written) in enumerate(units)
        },
    )


def _prompts(name: str) -> PromptSet:
    lines = (FOLDER / f"{name}.jsonl").read_bytes().splitlines()
    return PromptSet(name=name, prompts=tuple(map(Prompt.model_validate_json, lines)))


def _order(layer: int) -> list[str]:
    """The dictionary's features by index, fillers as "": known features are spread over it, not put first."""
    slots = [""] * _D_SAE
    for number, name in enumerate(_KNOWN[layer]):
        slots[(7 * number + 5 * layer) % _D_SAE] = name
    return slots


def _sae(layer: int, basis: Float[Tensor, "axis d_model"], generator: torch.Generator) -> DenseSae:
    """Known features read and write their axis, fillers random directions among the words' identities."""
    identity = basis[IDENTITY]
    random = torch.randn(_D_SAE, len(identity), generator=generator)
    rows = torch.nn.functional.normalize(random, dim=-1) @ identity
    thresholds = torch.full((_D_SAE,), _FILLER_THRESHOLD)
    for index, name in enumerate(_order(layer)):
        if name:
            rows[index], thresholds[index] = basis[AXIS[name]], _THRESHOLD
    b_enc, b_dec = torch.zeros(_D_SAE), CONSTANT * basis[AXIS["constant"]]
    return DenseSae(layer, rows.T.contiguous(), b_enc, thresholds, w_dec=rows.clone(), k=None, b_dec=b_dec)


def _transcoder(
    model: LlamaForCausalLM, layer: int, basis: Float[Tensor, "axis d_model"], generator: torch.Generator
) -> DenseSae:
    """First the MLP's hidden units (the up-projection is 1, so unit j is `relu(w_j · x)`), then fillers that read and,
    a little, write random directions among the words' identities."""
    weights, used = dict(model.named_parameters()), len(_units()[layer])
    gate, down = (weights[f"model.layers.{layer}.mlp.{name}_proj.weight"].detach() for name in ("gate", "down"))
    random = torch.randn(2, _D_SAE - used, len(basis[IDENTITY]), generator=generator)
    reads, writes = torch.nn.functional.normalize(random, dim=-1) @ basis[IDENTITY]
    reads = reads - _GATE * basis[AXIS["template"]]  # where the MLPs of some layers write nothing at all
    w_enc, w_dec = torch.cat([gate[:used], reads]).T, torch.cat([down.T[:used], _FILLER_WRITES * writes])
    b_enc = torch.tensor([0.0] * used + [-_FILLER_THRESHOLD] * len(reads))
    rest = b_enc, None, w_dec, None, torch.zeros(_D_MODEL)
    return DenseSae(layer, w_enc.contiguous(), *rest, reads="mlp_in", writes="mlp_out")


def _harm_of() -> dict[str, frozenset[FeatureId]]:
    order = _order(0)
    return {
        category: frozenset(FeatureId(0, order.index(f"harm{2 * number + part}")) for part in range(2))
        for number, category in enumerate(CATEGORIES)
    }


_KINDS = {"": "filler", "refuse": "refusal", "aligned": "aligned_inert", "backup": "redundant"}


def _truth() -> Truth:
    found: dict[str, set[FeatureId]] = {field.name: set() for field in fields(Truth)}
    for layer in _KNOWN:
        kinds = dict.fromkeys(HARM, "echo" if layer else "harm") | _KINDS
        for index, name in enumerate(_order(layer)):
            found[kinds.get(name, "distractor")].add(FeatureId(layer, index))
    return Truth(**{kind: frozenset(features) for kind, features in found.items()})
