"""A change of the residual of bounded size, as an attacker on the inside would make it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from demur.errors import InputError
from demur.method.interventions import Change, Intervention, Where
from demur.model import ChatModel


@dataclass(frozen=True, eq=False)
class PushResidual(Intervention):
    """`x ← x + radius·‖x‖·v/‖v‖` after one layer: at each token a step whose length is a share of the residual's.

    Among steps of one length, that along `−w` lowers a linear probe `w·x + b` most: its gradient is `w` everywhere.
    """

    vector: Float[Tensor, " d_model"]
    layer: int
    radius: float
    where: Where = "prompt"

    @property
    def label(self) -> str:
        return f"push({self.radius:g})"

    def acts_on(self, model: ChatModel) -> Iterable[int]:
        del model
        return (self.layer,)

    def change(self, model: ChatModel, layer: int) -> Change:
        if self.vector.shape != (model.d_model,):
            raise InputError(f"the push has shape {tuple(self.vector.shape)}; the model's width is {model.d_model}")
        step = self.radius * (self.vector / self.vector.norm()).to(model.layer_device(layer))

        def push(residual: Tensor) -> Tensor:
            return residual + (residual.float().norm(dim=-1, keepdim=True) * step).to(residual.dtype)

        return push
