"""Check whether SAEs are fit for the model: what they reconstruct, on the user's words, the template and the answers.

On the test prompts and the model's own answers: fraction of variance unexplained, active and dead features, what the
model loses when it computes on the reconstruction, whether the refusal direction and F*'s effect survive that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from demur.report import charts
from demur.report import format as fmt
from demur.report.blocks import Block, Chart, Section, Table, Text
from demur.stats import Estimate, bootstrap_mean, bootstrap_of
from demur.studies.base import Study, StudyResult
from demur.studies.config import FindConfig, Sources
from demur.types import Value

if TYPE_CHECKING:
    from demur.method.fidelity import Replacement, Splice
    from demur.method.likelihood import TokenLoss
    from demur.model import Items, Region
    from demur.saes import Sae
    from demur.studies.context import Context
    from demur.studies.pipeline import Found

Where = Literal["instruction", "post-instruction", "answer", "all"]
REGIONS: tuple[Where, ...] = ("instruction", "post-instruction", "answer")


_LEAST = 1e-3
"""Nats an answer that ablation must cost for a share of it to mean anything."""


class Config(FindConfig):
    """F*, and how faithful the SAEs are where it is found and where it acts."""

    group: ClassVar[str] = "Dictionaries"

    against: Sources = ()
    """Other SAEs of the same model to compare with, folders or hub ids; repeatable (the bundled model: those trained on
    it before its safety training)."""
    conversations: int = Field(default=100, ge=2)
    """Test prompts with the model's own answers on which SAEs are measured, half of each class."""
    by_region: bool = True
    """Also replace the residual in one region at a time (four times the passes)."""


class RegionRow(Value):
    """One layer's reconstruction of one region. `fvu`: squared error over variance; `l0`: active features a token."""

    layer: int
    region: Where
    fvu: Estimate
    l0: Estimate


class SpliceRow(Value):
    """What the model loses on its own answers (nats per token) when it computes on one layer's reconstruction, in one
    region or all. `recovered`: the share of what replacing the residual by its mean loses that is kept;
    `recovered_zero`: of what replacing it by 0 loses. `kl`: divergence from the clean model, nats per token."""

    layer: int
    where: Where
    rise: Estimate
    recovered: Estimate
    recovered_zero: Estimate
    kl: Estimate


class LayerRow(Value):
    """A layer's whole: the share of features that never fire, the cosine of the reconstructed refusal direction with
    the real one, and the share of F*'s effect on refusal that is left on the reconstruction."""

    layer: int
    dead: float
    cosine: float
    survives: Estimate


class SuiteRows(Value):
    """All that was measured of one suite."""

    name: str
    layers: tuple[LayerRow, ...]
    regions: tuple[RegionRow, ...]
    splices: tuple[SpliceRow, ...]

    def region(self, layer: int, region: Where) -> RegionRow:
        return next(row for row in self.regions if (row.layer, row.region) == (layer, region))

    def splice(self, layer: int, where: Where = "all") -> SpliceRow:
        return next(row for row in self.splices if (row.layer, row.where) == (layer, where))


class PairRow(Value):
    """The studied suite less another at one layer, on the same conversations: variance unexplained over all regions,
    and loss recovered."""

    other: str
    layer: int
    fvu: Estimate
    recovered: Estimate


class Result(StudyResult):
    """The suites, the studied one first."""

    suites: tuple[SuiteRows, ...]
    pairs: tuple[PairRow, ...]


class _Reconstructed(Value):
    """Sums of `method.fidelity.Reconstruction`, as they are kept in the run folder."""

    tokens: tuple[tuple[float, ...], ...]
    error: tuple[tuple[float, ...], ...]
    spread: tuple[tuple[float, ...], ...]
    active: tuple[tuple[float, ...], ...]
    dead: float
    mean: tuple[float, ...]


def run(context: Context[Any]) -> Result:
    """Measure every suite on the same conversations."""
    from demur.studies.pipeline import find

    found = find(context, context.splits.choosing)
    meter = _Meter(context, found)
    measured: dict[str, dict[int, _Layer]] = {}
    own_name = context.suite.source if context.config.model else "trained on the chat model"
    for name, suite in {own_name: context.suite, **context.inputs.others}.items():
        with context.timed(name):
            layers = context.each(partial(meter.layer, name, suite[layer]) for layer in suite.layers)
            measured[name] = dict(zip(suite.layers, layers, strict=True))
    (first, own), *others = measured.items()
    return Result(
        suites=tuple(_rows(name, layers) for name, layers in ((first, own), *others)),
        pairs=tuple(
            own[layer].against(name, layer, layers[layer])
            for name, layers in others
            for layer in own
            if layer in layers
        ),
    )


def _rows(name: str, layers: Mapping[int, _Layer]) -> SuiteRows:
    return SuiteRows(
        name=name,
        layers=tuple(
            LayerRow(layer=layer, dead=each.made.dead, cosine=each.cosine, survives=each.survives)
            for layer, each in layers.items()
        ),
        regions=tuple(row for layer, each in layers.items() for row in each.regions(layer)),
        splices=tuple(row for layer, each in layers.items() for row in each.splices(layer)),
    )


@dataclass(frozen=True)
class _Losses:
    """Losses of every conversation's answer under the three replacements of one place, and the divergence."""

    clean: Sequence[TokenLoss]
    by: Mapping[Replacement, Sequence[TokenLoss]]
    kl: Sequence[TokenLoss]

    @property
    def table(self) -> np.ndarray:
        """Nats by conversation: clean, reconstructed, mean, zero."""
        columns = (self.clean, *(self.by[kind] for kind in ("sae", "mean", "zero")))
        return np.array([[loss.nats for loss in each] for each in columns]).T

    def row(self, layer: int, where: Where) -> SpliceRow:
        tokens = [loss.tokens for loss in self.clean]
        rises = [(b.nats - a.nats) / a.tokens for a, b in zip(self.clean, self.by["sae"], strict=True)]
        return SpliceRow(
            layer=layer,
            where=where,
            rise=bootstrap_mean(rises, tokens),
            recovered=bootstrap_of(lambda m: _recovered(m, 2), self.table),
            recovered_zero=bootstrap_of(lambda m: _recovered(m, 3), self.table),
            kl=bootstrap_mean([loss.nats / loss.tokens for loss in self.kl], tokens),
        )


def _recovered(means: np.ndarray, ablated: int, first: int = 0) -> np.ndarray:
    """`(ablated − reconstructed) / (ablated − clean)` from columns clean, reconstructed, mean, zero; nan where ablation
    costs nothing, as on the user's words after the last layer, which nothing reads."""
    clean, made, worst = (means[..., first + n] for n in (0, 1, ablated))
    return np.divide(worst - made, worst - clean, out=np.full_like(worst, np.nan), where=worst - clean > _LEAST)


@dataclass(frozen=True)
class _Layer:
    """What was measured of one SAE."""

    made: _Reconstructed
    losses: Mapping[Where, _Losses]
    cosine: float
    survives: Estimate

    def regions(self, layer: int) -> Iterator[RegionRow]:
        tokens, error, spread, active = (
            np.array(each) for each in (self.made.tokens, self.made.error, self.made.spread, self.made.active)
        )
        for n, region in enumerate(REGIONS):
            yield RegionRow(
                layer=layer,
                region=region,
                fvu=_ratio(error[:, n], spread[:, n]),
                l0=_ratio(active[:, n], tokens[:, n]),
            )

    def splices(self, layer: int) -> Iterator[SpliceRow]:
        return (losses.row(layer, where) for where, losses in self.losses.items())

    def against(self, name: str, layer: int, other: _Layer) -> PairRow:
        sums = [np.array(each).sum(1) for m in (self.made, other.made) for each in (m.error, m.spread)]
        losses = np.concatenate([self.losses["all"].table, other.losses["all"].table], 1)
        return PairRow(
            other=name,
            layer=layer,
            fvu=bootstrap_of(lambda m: m[..., 0] / m[..., 1] - m[..., 2] / m[..., 3], np.stack(sums, 1)),
            recovered=bootstrap_of(lambda m: _recovered(m, 2) - _recovered(m, 2, 4), losses),
        )


def _ratio(above: np.ndarray, below: np.ndarray) -> Estimate:
    """Ratio of sums over conversations, with a bootstrap interval."""

    def ratio(means: np.ndarray) -> np.ndarray:
        high, low = means[..., 0], means[..., 1]
        return np.divide(high, low, out=np.full_like(high, np.nan), where=low > 0)

    return bootstrap_of(ratio, np.stack([above, below], 1))


class _Meter:
    """Measures SAEs on the same conversations, once per run folder."""

    def __init__(self, context: Context[Config], found: Found) -> None:
        from demur.studies.pipeline import split_used

        self.context, self.found = context, found
        half = context.config.conversations // 2
        test = context.splits.test
        answered = [
            context.answer(f"clean: test, {name}", prompts.head(half))
            for name, prompts in (("harmful", test.harmful), ("harmless", test.harmless))
        ]
        self.refused = split_used(*answered).harmful
        self.answers = [answer for each in answered for answer in each.answers if answer.text]

    @cached_property
    def items(self) -> Items:
        from demur.method.likelihood import answers_to_score

        return answers_to_score(self.context.model, self.answers)

    @cached_property
    def places(self) -> dict[Where, tuple[Region, ...]]:
        from demur.method.fidelity import REGIONS as every

        found: dict[Where, tuple[Region, ...]] = {"all": every}
        if self.context.config.by_region:
            found |= {where: (each,) for where, each in zip(REGIONS, every, strict=True)}
        return found

    def layer(self, name: str, sae: Sae) -> _Layer:
        from demur.method.fidelity import Splice

        label, layer = f"{name}: layer {sae.spec.layer}", sae.spec.layer
        dense = sae.dense()
        key = sae.spec.identity
        made = self._once(
            "reconstruction", {"sae": key, "layer": layer}, _Reconstructed, lambda: self._made(dense), label
        )

        def replaced(kind: Replacement, regions: tuple[Region, ...]) -> Splice:
            import torch

            by = {"sae": dense, "zero": None, "mean": torch.tensor(made.mean)}[kind]
            return Splice(layer, kind, key if kind == "sae" else "", by, regions)

        losses: dict[Where, _Losses] = {}
        for where, regions in self.places.items():
            by: dict[Replacement, Splice] = {kind: replaced(kind, regions) for kind in ("sae", "mean", "zero")}
            losses[where] = _Losses(
                self._losses(None), {kind: self._losses(each) for kind, each in by.items()}, self._kl(by["sae"])
            )
        return _Layer(made, losses, self._cosine(key, dense), self._survives(replaced("sae", self.places["all"])))

    def _once(self, name: str, depends: dict[str, Any], kind: Any, compute: Any, label: str = "") -> Any:
        texts = [(answer.prompt.id, answer.prompt.text, answer.text) for answer in self.answers]
        return self.context.cached(name, {"conversations": texts} | depends, kind, compute, label)

    def _made(self, dense: Any) -> _Reconstructed:
        from demur.method.fidelity import reconstruction

        found = reconstruction(self.context.model, dense, self.items)
        sums = {name: tuple(map(tuple, getattr(found, name).tolist())) for name in _SUMS}
        return _Reconstructed(**sums, dead=found.dead, mean=tuple(found.mean.tolist()))

    def _losses(self, splice: Splice | None) -> Sequence[TokenLoss]:
        from demur.method.interventions import Compiled
        from demur.method.likelihood import TokenLoss, token_losses

        def compute() -> list[TokenLoss]:
            model = self.context.model
            return token_losses(model, self.items, splice and Compiled(model, None, [splice]))

        return self._once("spliced-losses", {"splice": splice and splice.id}, list[TokenLoss], compute)

    def _kl(self, splice: Splice) -> Sequence[TokenLoss]:
        from demur.method.interventions import Compiled
        from demur.method.likelihood import TokenLoss, response_kl

        def compute() -> list[TokenLoss]:
            model = self.context.model
            return response_kl(model, self.items, Compiled(model, None, [splice]))

        return self._once("spliced-kl", {"splice": splice.id}, list[TokenLoss], compute)

    def _cosine(self, key: str, dense: Any) -> float:
        from demur.method.fidelity import direction_cosine

        used, position = self.found.clean.used("direction"), self.found.direction.position
        high, low = (self.context.model.tokenize(each) for each in (used.harmful, used.harmless))
        # Two layers may have the same SAE.
        depends = {
            "sae": key,
            "layer": dense.layer,
            "prompts": [used.harmful.digest, used.harmless.digest],
            "position": position,
        }

        def compute() -> float:
            return direction_cosine(self.context.model, dense, high, low, position)

        return self.context.cached("direction-cosine", depends, float, compute)

    def _survives(self, splice: Splice) -> Estimate:
        """Mean fall of the refusal log-odds by taking F* out, on the reconstruction over that on the residual."""
        from demur.method.interventions import ScaleFeatures
        from demur.studies.gauge import log_odds

        ids, out = self.found.clean.refusal_ids, ScaleFeatures(self.found.chosen.features, 0.0)
        changes = ((), (out,), (splice,), (splice, out))
        table = np.array([log_odds(self.context, self.refused, ids, each) for each in changes]).T
        return bootstrap_of(lambda m: (m[..., 2] - m[..., 3]) / (m[..., 0] - m[..., 1]), table)


_SUMS = ("tokens", "error", "spread", "active")


# -- what is shown -----------------------------------------------------------------------------------------------------


def sections(result: Result) -> list[Section]:
    """The verdict and one table by layer first; then regions, comparisons of suites, and pictures."""
    own, *others = result.suites
    found = [Section("Are the SAEs fit?", (Text(_verdict(result), "verdict"), _table(own)), brief=True)]
    if others:
        found.append(_compared(result))
    found.append(Section("By region", tuple(_regions(result)), intro=_REGIONS_TOLD))
    found += [Section(f"Layers of SAEs {each.name}", (_table(each),)) for each in others]
    return found


_REGIONS_TOLD = (
    "SAEs are trained on text; template tokens, where refusal is decided, are often reconstructed worse than words. "
    "FVU: squared error over the variance of that region's residuals. Loss recovered in a region: the residual is "
    "replaced there only."
)


def _verdict(result: Result) -> str:
    own = result.suites[0]
    recovered = [own.splice(row.layer).recovered.value for row in own.layers]
    worst = max(own.regions, key=lambda row: row.fvu.value)
    text = (
        f"Computing on the reconstruction of one layer keeps {fmt.percent(float(np.nanmedian(recovered)))} of what the "
        f"layer's residual is worth to the model's answers (median of {len(recovered)} layers, the least "
        f"{fmt.percent(float(np.nanmin(recovered)))}); the worst region is {worst.region} tokens of layer "
        f"{worst.layer} (FVU {fmt.estimate_text(worst.fvu)})."
    )
    for other in result.suites[1:]:
        rows = [row for row in result.pairs if row.other == other.name]
        better, worse = sum(row.recovered.low > 0 for row in rows), sum(row.recovered.high < 0 for row in rows)
        text += (
            f" They recover more loss than the SAEs {other.name} at {better} of {len(rows)} layers and less at {worse} "
            "(intervals apart from 0)."
        )
    return text


def _table(suite: SuiteRows) -> Table:
    columns = (
        "layer | > FVU: instruction, post-instruction, answer | > L0: active features a token, in the same regions | "
        "> dead: features that fire on no counted token | > loss recovered: share of what mean ablation loses | "
        "> of zero ablation | > ΔCE: nats per answer token | > KL: nats per answer token | > direction: cosine of the "
        "reconstructed refusal direction | > F* survives: share of F*'s effect on refusal"
    )
    rows: list[tuple[Any, ...]] = []
    for row in suite.layers:
        spliced = suite.splice(row.layer)
        regions = [suite.region(row.layer, each) for each in REGIONS]
        rows.append(
            (
                row.layer,
                " ".join(fmt.measure(each.fvu.value) for each in regions),
                " ".join(fmt.measure(each.l0.value, 0) for each in regions),
                fmt.percent(row.dead),
                fmt.estimate_text(spliced.recovered, 3),
                fmt.estimate_text(spliced.recovered_zero, 3),
                fmt.estimate_text(spliced.rise, 3),
                fmt.measure(spliced.kl.value, 3),
                fmt.measure(row.cosine, 3),
                fmt.estimate_text(row.survives),
            )
        )
    return Table.of(
        f"SAEs {suite.name}", columns, rows, caption="95 % intervals over conversations; one layer replaced at a time."
    )


def _compared(result: Result) -> Section:
    rows = [
        (row.other, row.layer, fmt.estimate_text(row.fvu, 3), fmt.estimate_text(row.recovered, 3))
        for row in result.pairs
    ]
    table = Table.of(
        f"SAEs {result.suites[0].name} less others",
        "others | layer | > FVU: below 0, the first is better | > loss recovered: above 0, the first keeps more",
        rows,
        caption="The same conversations for both; 95 % intervals of the difference.",
    )
    lines = [
        charts.Series(
            suite.name,
            tuple(charts.Point(row.layer, suite.splice(row.layer).recovered.value) for row in suite.layers),
        )
        for suite in result.suites
    ]
    chart = Chart(
        "Loss recovered by layer",
        lambda: charts.line_chart(lines, x_title="layer", y_title="loss recovered (mean ablation)", share=False),
    )
    told = "A suite trained on other text would be as good here; a difference whose interval holds 0 shows nothing."
    return Section("Suites side by side", (table, chart), intro=told)


def _regions(result: Result) -> Iterator[Block]:
    for suite in result.suites:
        lines = [
            charts.Series(
                region, tuple(charts.Point(row.layer, row.fvu.value) for row in suite.regions if row.region == region)
            )
            for region in REGIONS
        ]
        yield Chart(
            f"FVU by layer: SAEs {suite.name}",
            lambda lines=lines: charts.line_chart(lines, x_title="layer", y_title="FVU", share=False),
        )
        rows = [
            (
                row.layer,
                row.region,
                fmt.estimate_text(row.fvu),
                fmt.estimate_text(row.l0, 1),
                *(fmt.estimate_text(each, 3) for each in _replaced_there(suite, row)),
            )
            for row in suite.regions
        ]
        yield Table.of(
            f"Regions: SAEs {suite.name}",
            "layer | region | > FVU | > L0: active features a token | > loss recovered | > ΔCE: nats per answer token",
            rows,
            folded=True,
        )


def _replaced_there(suite: SuiteRows, row: RegionRow) -> tuple[Estimate | None, Estimate | None]:
    """Loss recovered and ΔCE where only this region is replaced; None where that was not asked for."""
    found = [each for each in suite.splices if (each.layer, each.where) == (row.layer, row.region)]
    return (found[0].recovered, found[0].rise) if found else (None, None)


STUDY = Study("dictionaries", Config, Result, run, sections, residual="it replaces that by its reconstruction")
