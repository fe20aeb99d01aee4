"""A model and dictionary built by hand, whose causal features are known; `docs/explanation/planted.md` tells how."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from demur.saes import DenseSae, Suite
from demur.testing import _planted_circuit as circuit
from demur.testing._tiny_models import tokenizer_of
from demur.types import FeatureId, Prompt, PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_D_SAE = 48
_THRESHOLD = 0.1
_FILLER_THRESHOLD = 0.3  # a filler then fires on about one token in fourteen

# The axes that dictionaries have a feature for, besides fillers, in the order of the layers that write them.
_AXES = (*circuit.HARM, "general0", "general1", "refuse", "aligned", "aftermath", "backup")
_KNOWN = {0: _AXES[:-4], 1: _AXES[:-2], 2: _AXES[:-1], 3: _AXES}


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
        harmful: 64 prompts it refuses, 16 of each of 4 categories.
        harmless: 64 prompts it answers.
        over_refusal: 32 harmless prompts with one harm word, which it answers.
        truth: what each feature is.
        harm_of: category of a harmful prompt → the two harm features that fire on it.
        refusal: its refusal, word for word.
        compliance: its answer to everything else.
        refusal_token, compliance_token: the first tokens of these.
        axes: where each named axis of the circuit points: unit vectors of length `d_model`.
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


def planted(*, seed: int = 0) -> Planted:
    """Build the planted model. Equal seeds give equal weights; the global random state is left alone.

    Args:
        seed: of the residual's rotation, the words' identities and the fillers; never of the circuit.
    """
    tokenizer = tokenizer_of("planted")
    model, basis = circuit.build(tokenizer, seed)
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
        refusal="".join(circuit.REFUSAL),
        compliance="".join(circuit.COMPLIANCE),
        refusal_token=circuit.token(tokenizer, circuit.REFUSAL[0]),
        compliance_token=circuit.token(tokenizer, circuit.COMPLIANCE[0]),
        axes={name: basis[number] for name, number in circuit.AXIS.items()},
    )


def _prompts(name: str) -> PromptSet:
    lines = (circuit.FOLDER / f"{name}.jsonl").read_bytes().splitlines()
    return PromptSet(name=name, prompts=tuple(map(Prompt.model_validate_json, lines)))


def _order(layer: int) -> list[str]:
    """The dictionary's features by index, fillers as "": known features are spread over it, not put first."""
    slots = [""] * _D_SAE
    for number, name in enumerate(_KNOWN[layer]):
        slots[(7 * number + 5 * layer) % _D_SAE] = name
    return slots


def _sae(layer: int, basis: Float[Tensor, "axis d_model"], generator: torch.Generator) -> DenseSae:
    """Known features read and write their axis, fillers random directions among the words' identities."""
    identity = basis[circuit.IDENTITY]
    random = torch.randn(_D_SAE, len(identity), generator=generator)
    rows = torch.nn.functional.normalize(random, dim=-1) @ identity
    thresholds = torch.full((_D_SAE,), _FILLER_THRESHOLD)
    for index, name in enumerate(_order(layer)):
        if name:
            rows[index] = basis[circuit.AXIS[name]]
            thresholds[index] = _THRESHOLD
    return DenseSae(
        layer=layer,
        w_enc=rows.T.contiguous(),
        b_enc=torch.zeros(_D_SAE),
        threshold=thresholds,
        k=None,
        w_dec=rows.clone(),
        b_dec=circuit.CONSTANT * basis[circuit.AXIS["constant"]],
    )


def _harm_of() -> dict[str, frozenset[FeatureId]]:
    order = _order(0)
    return {
        category: frozenset(FeatureId(0, order.index(f"harm{2 * number + part}")) for part in range(2))
        for number, category in enumerate(circuit.CATEGORIES)
    }


_KINDS = {"": "filler", "refuse": "refusal", "aligned": "aligned_inert", "backup": "redundant"}


def _truth() -> Truth:
    found: dict[str, set[FeatureId]] = {field.name: set() for field in fields(Truth)}
    for layer in _KNOWN:
        for index, name in enumerate(_order(layer)):
            harm = "harm" if layer == 0 else "echo"
            kind = harm if name in circuit.HARM else _KINDS.get(name, "distractor")
            found[kind].add(FeatureId(layer, index))
    return Truth(**{kind: frozenset(features) for kind, features in found.items()})
