"""Why one adversarial prompt gets through: a few features, at single tokens, whose values on the plain prompt bring
refusal back.

Greedy, after LOCA (arXiv 2605.00123). The distance to refusal is the KL divergence of the first answer token from the
plain prompt's distribution to the adversarial one's. Setting feature `i` at token `t` to its plain value promises a
change of `∂KL/∂x[t] · d_i` times the difference of the two values; the patch that promises the largest fall is made,
everything is computed anew, and so on until the model would refuse. What is not needed in the end is taken out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from demur.method.activations import BLOCK, feature_activations
from demur.method.interventions import Compiled, HoldFeatures, PerPrompt
from demur.model import ChatModel, Region, TokenizedPrompt, hooked
from demur.saes import Rows, Suite
from demur.types import FeatureField, FeatureId, Value

_AtTokens = dict[int, Float[Tensor, "token d_model"]]
"""Layer → residuals or gradients at some tokens of one prompt."""


class Patch(Value):
    """One feature at one token of the adversarial prompt set to its value on the plain prompt."""

    feature: FeatureField
    token: int
    """Place in the adversarial prompt, counted from its first token."""
    before: float
    """Activation in the adversarial run with the earlier patches in place, in the SAE's units."""
    value: float
    """Activation on the plain prompt, at the token's counterpart."""
    predicted: float
    """Change of the KL divergence that the gradient promises, nats."""


class LocalExplanation(Value):
    """The patches that restore refusal, in the order in which they were found. `kl` (nats) and `p_refuse` are before
    the first patch and after each one that the search made; `patches` are those that are left when the unnecessary
    ones are taken out again, `p_restored` is P(refuse) under them. `restored`: it reached the threshold. `drawn` are as
    many patches drawn at random in the same layers and at the same tokens: the control."""

    prompt_id: str
    kl: tuple[float, ...]
    p_refuse: tuple[float, ...]
    patches: tuple[Patch, ...]
    p_restored: float
    restored: bool
    drawn: tuple[Patch, ...] = ()


def counterparts(model: ChatModel, plain: TokenizedPrompt, adversarial: TokenizedPrompt) -> dict[int, int]:
    """Token of the adversarial prompt → the same token of the plain one: the template's tokens after the message one by
    one from the end, the message's where both hold the same words in the same order (without case and spaces)."""

    def words(item: TokenizedPrompt) -> tuple[list[int], list[str]]:
        places = [n for n, region in enumerate(item.regions) if region == Region.INSTRUCTION]
        return places, [str(model.tokenizer.decode([item.ids[n]])).strip().casefold() for n in places]

    (ours, said), (theirs, asked) = words(adversarial), words(plain)
    found = {
        ours[block.a + n]: theirs[block.b + n]
        for block in SequenceMatcher(None, said, asked, autojunk=False).get_matching_blocks()
        for n in range(block.size)
    }
    after = min(plain.n_post_instruction, adversarial.n_post_instruction)
    return found | {len(adversarial) - n: len(plain) - n for n in range(after, 0, -1)}


def transplant(
    model: ChatModel, suite: Suite, plain: TokenizedPrompt, adversarial: TokenizedPrompt, features: Sequence[FeatureId]
) -> HoldFeatures:
    """Features held at their values on the plain prompt, at every token of the adversarial one that has a counterpart
    there."""
    (values,) = feature_activations(model, suite, [plain], features)
    held = torch.full((len(adversarial), len(features)), torch.nan)
    for token, other in counterparts(model, plain, adversarial).items():
        held[token] = values[other]
    return HoldFeatures(tuple(features), held)


def hold_patches(patches: Sequence[Patch], tokens: int) -> HoldFeatures:
    """Patches as an intervention on a prompt of so many tokens."""
    features = tuple(dict.fromkeys(patch.feature for patch in patches))
    values = torch.full((tokens, len(features)), torch.nan)
    for patch in patches:
        values[patch.token, features.index(patch.feature)] = patch.value
    return HoldFeatures(features, values)


@dataclass(frozen=True)
class _State:
    """One run under patches: KL and P(refuse), and by layer what its SAE read and the KL's gradient where it writes,
    at the tokens with a counterpart."""

    kl: float
    p_refuse: float
    entered: _AtTokens
    gradients: _AtTokens


class LocalSearch:
    """The search on one pair of prompts. Candidates are all features, of `layers`, that are active in either prompt at
    a token that has a counterpart in the other.

    Args:
        model, suite: model and SAEs.
        plain: the prompt that is refused.
        adversarial: the one that is not.
        refusal_ids: first tokens of refusals.
        layers: whose features may be patched (default: all of the suite).
    """

    def __init__(
        self,
        model: ChatModel,
        suite: Suite,
        plain: TokenizedPrompt,
        adversarial: TokenizedPrompt,
        refusal_ids: Sequence[int],
        layers: Sequence[int] | None = None,
    ) -> None:
        self._model, self._suite, self._refusal_ids = model, suite, list(refusal_ids)
        self._item = adversarial
        pairs = counterparts(model, plain, adversarial)
        self._tokens = list(pairs)
        self._rows: dict[int, Rows] = {}
        self._values: dict[int, Float[Tensor, "token k"]] = {}
        self._indices: dict[int, list[int]] = {}
        layers = suite.layers if layers is None else layers
        (theirs, log_p), (ours, _) = (self._plain_run(item, layers) for item in (plain, adversarial))
        self._wanted = log_p
        for layer in layers:
            there, here = theirs[layer][list(pairs.values())], ours[layer][self._tokens]
            both = torch.cat([there, here])
            blocks = suite[layer].encoder_blocks(BLOCK)
            active = torch.cat([(b.to(both.device).encode(both) > 0).any(0).cpu() for b in blocks])
            if indices := active.nonzero()[:, 0].tolist():
                self._indices[layer] = indices
                self._rows[layer] = suite[layer].rows(indices).to(both.device)
                self._values[layer] = self._rows[layer].encode(there)

    def _plain_run(self, item: TokenizedPrompt, layers: Sequence[int]) -> tuple[_AtTokens, Float[Tensor, " vocab"]]:
        with torch.inference_mode(), self._model.capture(tuple(layers), sites=self._suite.reads) as residuals:
            logits = self._model.last_logits(self._model.batch([item]))
        return {layer: residuals[layer][0] for layer in layers}, logits[0].log_softmax(-1)

    def run(self, patches: Sequence[Patch] = ()) -> _State:
        """One pass under patches, with the gradient of the KL divergence."""
        entered: _AtTokens = {}
        left: _AtTokens = {}

        def enter(layer: int, residual: Tensor) -> None:
            entered[layer] = residual.detach()[0, self._tokens]

        def leave(layer: int, residual: Tensor) -> Tensor:
            # Parameters are frozen, so the graph begins here, at the first layer.
            left[layer] = residual if residual.requires_grad else residual.detach().requires_grad_()
            return left[layer]

        model, batch = self._model, self._model.batch([self._item])
        entering, leaving = ({layer: partial(each, layer) for layer in self._rows} for each in (enter, leave))
        with (
            torch.enable_grad(),
            hooked(model.points(self._suite.reads), entering),
            self._compiled(patches).on(batch),
            hooked(model.layers, leaving),
        ):
            log_q = model.last_logits(batch)[0].log_softmax(-1)
        kl = (self._wanted.exp() * (self._wanted - log_q)).sum()
        found = torch.autograd.grad(kl, list(left.values()))
        gradients = {layer: each[0, self._tokens].float() for layer, each in zip(left, found, strict=True)}
        p_refuse = float(log_q.detach()[self._refusal_ids].exp().sum())
        return _State(max(0.0, float(kl.detach())), p_refuse, entered, gradients)

    def _compiled(self, patches: Sequence[Patch]) -> Compiled:
        hold = hold_patches(patches, len(self._item))
        return Compiled(self._model, self._suite, [PerPrompt({self._item.prompt_id: (hold,)})] if patches else [])

    def _best(self, state: _State, made: Sequence[Patch]) -> Patch | None:
        """The patch that promises the largest fall of the KL divergence; None where none promises any."""
        done = {(patch.feature, patch.token) for patch in made}
        best: Patch | None = None
        for layer, rows in self._rows.items():
            now = rows.encode(state.entered[layer])
            promised = (self._values[layer] - now) * (state.gradients[layer] @ rows.w_dec.T)
            for feature, token in done:
                if feature.layer == layer and feature.index in self._indices[layer]:
                    promised[self._tokens.index(token), self._indices[layer].index(feature.index)] = 0.0
            place, column = divmod(int(promised.argmin()), promised.shape[1])
            predicted = float(promised[place, column])
            if predicted < (best.predicted if best else 0.0):
                best = Patch(
                    feature=FeatureId(layer, self._indices[layer][column]),
                    token=self._tokens[place],
                    before=float(now[place, column]),
                    value=float(self._values[layer][place, column]),
                    predicted=predicted,
                )
        return best

    def explain(self, *, limit: int = 24, threshold: float = 0.5, seed: int = 0) -> LocalExplanation:
        """Patch until P(refuse) reaches `threshold`, or `limit` patches are made, or none promises anything; then take
        out, earliest first, each patch without which the threshold still holds. `seed` is that of the control."""
        made: list[Patch] = []
        states = [self.run()]
        while states[-1].p_refuse < threshold and len(made) < limit:
            patch = self._best(states[-1], made)
            if patch is None:
                break
            made.append(patch)
            states.append(self.run(made))
        restored = states[-1].p_refuse >= threshold
        kept, p_kept = tuple(made), states[-1].p_refuse
        for patch in made if restored else ():
            fewer = tuple(each for each in kept if each is not patch)
            if (p := self.run(fewer).p_refuse) >= threshold:
                kept, p_kept = fewer, p
        return LocalExplanation(
            prompt_id=self._item.prompt_id,
            kl=tuple(state.kl for state in states),
            p_refuse=tuple(state.p_refuse for state in states),
            patches=kept,
            p_restored=p_kept,
            restored=restored,
            drawn=self._drawn(kept, states[0], Random(seed)),
        )

    def _drawn(self, patches: Sequence[Patch], state: _State, random: Random) -> tuple[Patch, ...]:
        """For each patch another feature of its layer, at its token, whose value differs there between the prompts."""
        found: dict[tuple[FeatureId, int], Patch] = {}
        for patch in patches:
            layer, place = patch.feature.layer, self._tokens.index(patch.token)
            now = self._rows[layer].encode(state.entered[layer][place])
            values = self._values[layer][place]
            free = [
                n
                for n in (values - now).abs().gt(1e-6).nonzero()[:, 0].tolist()
                if (FeatureId(layer, self._indices[layer][n]), patch.token) not in found
                and self._indices[layer][n] != patch.feature.index
            ]
            if free:
                n = random.choice(free)
                feature = FeatureId(layer, self._indices[layer][n])
                found[feature, patch.token] = Patch(
                    feature=feature, token=patch.token, before=float(now[n]), value=float(values[n]), predicted=0.0
                )
        return tuple(found.values())
