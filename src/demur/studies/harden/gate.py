"""The probe of harm that decides where a change acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from demur.types import PromptSet

if TYPE_CHECKING:
    from demur.studies.context import Context
    from demur.studies.pipeline import Found


@dataclass(frozen=True)
class Gate:
    """P(harmful) of prompts. (stub)"""

    context: Any
    layer: int
    model: Any
    title: str = "stub"
    known: dict = __import__("dataclasses").field(default_factory=dict)

    @classmethod
    def of(cls, context: Context[Any], found: Found) -> Gate:
        from sklearn.linear_model import LogisticRegression
        import torch

        splits = context.splits
        best = None
        for layer in range(context.model.n_layers):
            x = torch.cat(
                [
                    _read(context, layer, p)
                    for s in (splits.direction, splits.selection)
                    for p in (s.harmful, s.harmless)
                ]
            ).numpy()
            y = np.concatenate(
                [
                    np.full(len(p), float(i))
                    for s in (splits.direction, splits.selection)
                    for i, p in ((1, s.harmful), (0, s.harmless))
                ]
            )
            m = LogisticRegression(C=0.01, max_iter=1000).fit(x, y)
            xv = torch.cat(
                [_read(context, layer, p) for s in (splits.tuning,) for p in (s.harmful, s.harmless)]
            ).numpy()
            yv = np.concatenate([np.full(len(splits.tuning.harmful), 1.0), np.zeros(len(splits.tuning.harmless))])
            from sklearn.metrics import log_loss

            s = -log_loss(yv, m.predict_proba(xv)[:, 1])
            if best is None or s > best[0]:
                best = (s, layer, m)
        return cls(context, best[1], best[2])

    def scores(self, prompts: PromptSet) -> np.ndarray:
        if not len(prompts):
            return np.zeros(0)
        if prompts.digest not in self.known:
            self.known[prompts.digest] = self.model.predict_proba(_read(self.context, self.layer, prompts).numpy())[:, 1]
        return self.known[prompts.digest]


def _read(context, layer, prompts):
    import torch

    model = context.model

    def run(batch):
        with torch.inference_mode(), model.capture([layer], lambda r: r) as res:
            model.last_logits(batch)
        mask = batch.real
        x = res[layer].float()
        from demur.model import SCORED_REGIONS

        w = batch.within(SCORED_REGIONS).float()[..., None]
        return list(((x * w).sum(1) / w.sum(1)).cpu())

    return torch.stack(model.each(model.tokenize(prompts), run))
