"""How releases store their SAEs, and what a further `Layout` is written with: `LAYOUTS.register(name, layout)` adds one
for this process, an entry point of the group `demur.sae_layouts` one for good."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from demur.errors import SaeError
from demur.registry import Registry
from demur.saes._canonical import Convention, SaeSpec, SaeWeights, width_number
from demur.saes._files import Arrays, Config, NamedArray, SaeFiles, memory_array, open_arrays
from demur.saes._sae import Sae
from demur.types import Site

__all__ = [
    "LAYOUTS", "Arrays", "Config", "Convention", "FoundSae", "HookError", "Layout", "NamedArray", "SaeFiles",
    "SaeWeights", "memory_array", "mlp_sites", "open_arrays", "residual_layer", "width_number",
]  # fmt: skip


class HookError(SaeError):
    """An SAE was trained on something else than the residual stream between decoder layers, or a transcoder on
    something else than the MLP of one layer."""


_PLAIN = Convention()


@dataclass(frozen=True)
class FoundSae:
    """One SAE in a source, before its weights are opened.

    Attributes:
        files, weights: the source, and its npz or safetensors file there.
        layer, convention, hook: as in `SaeSpec` and `SaeWeights`.
        d_model, d_sae: its shape, where names or configurations say it; otherwise the file is opened to see.
        average_l0: mean number of active features per token, or a function that looks it up; None: unknown.
        read: finds its arrays in the file; by default under their usual names.
        reads, writes: where in its layer, as in `SaeSpec`.
    """

    files: SaeFiles
    weights: str
    layer: int
    convention: Convention = _PLAIN
    d_model: int | None = None
    d_sae: int | None = None
    hook: str = "resid_post"
    average_l0: float | Callable[[], float | None] | None = None
    read: Callable[[Arrays, Convention], SaeWeights] = SaeWeights.of
    reads: Site = "resid_post"
    writes: Site = "resid_post"

    @property
    def l0(self) -> float | None:
        """`average_l0`, looked up."""
        return self.average_l0() if callable(self.average_l0) else self.average_l0

    def open(self) -> SaeWeights:
        """Its arrays, none of them read yet."""
        return self.read(self.files.arrays(self.weights), self.convention)

    def sae(self) -> Sae:
        """The SAE, to be opened when weights are asked for."""
        d_model, d_sae = self.d_model, self.d_sae
        if d_model is None or d_sae is None:
            weights = self.open()
            d_model, d_sae = weights.d_model, weights.d_sae
        folded = hashlib.sha256(repr(self.convention).encode()).hexdigest()[:16]
        where = "" if self.reads == "resid_post" else f":{self.reads}>{self.writes}"
        spec = SaeSpec(
            layer=self.layer,
            reads=self.reads,
            writes=self.writes,
            d_model=d_model,
            d_sae=d_sae,
            activation=self.convention.activation,
            k=self.convention.k,
            hook=self.hook,
            source=f"{self.files.name}/{self.weights}",
            average_l0=self.l0,
            identity=self.files.identity(self.weights) + ("" if self.convention == _PLAIN else f":{folded}") + where,
        )
        return Sae(spec, self.open, is_here=lambda: self.files.is_here(self.weights))


@dataclass(frozen=True)
class Layout:
    """How one family of releases stores its SAEs."""

    title: str
    """The family and its files, for people."""
    marker: str
    """Regular expression of the path of the one file that marks an SAE, or of its configuration."""
    describe: Callable[[SaeFiles, re.Match[str]], FoundSae | None]
    """What names and configurations say of an SAE, given the match of `marker`; None: no SAE after all. Raises
    HookError for an SAE of other activations than the residual stream's or an MLP's."""

    def find(self, files: SaeFiles) -> list[FoundSae]:
        """All SAEs of this layout that read the residual stream, or where there are none all transcoders; HookError
        where all are of other activations."""
        found: list[FoundSae | None] = []
        refusals: list[HookError] = []
        for match in filter(None, map(re.compile(self.marker).fullmatch, files.files)):
            try:
                found.append(self.describe(files, match))
            except HookError as error:
                refusals.append(error)
        if refusals and not any(found):
            raise refusals[0]
        known = [sae for sae in found if sae]
        return [sae for sae in known if sae.reads == "resid_post"] or known


LAYOUTS: Registry[Layout] = Registry(
    "demur.sae_layouts",
    "SAE layout",
    {
        "gemma-scope": "demur.saes.layouts.scope:GEMMA_SCOPE",
        "gemma-scope-2": "demur.saes.layouts.scope:GEMMA_SCOPE_2",
        "llama-scope": "demur.saes.layouts.scope:LLAMA_SCOPE",
        "circuit-tracer": "demur.saes.layouts.transcoders:CIRCUIT_TRACER",
        "saelens": "demur.saes.layouts.saelens:SAELENS",
        "saelens-registry": "demur.saes.layouts.saelens:SAELENS_REGISTRY",
    },
)
"""The known layouts, in the order in which a source is compared with them."""

_POST = re.compile(
    r"blocks\.(\d+)\.hook_resid_post|(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)(?:\.output)?"
)
_PRE = re.compile(r"blocks\.(\d+)\.hook_resid_pre")


_INSIDE = r"(?:blocks\.\d+\.|(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.\d+\.)?"
_READS: dict[Site, str] = {
    "mlp_in": _INSIDE + r"(?:mlp\.hook_in|pre_feedforward_layernorm\.output)",
    "resid_mid": _INSIDE + r"(?:hook_resid_mid|pre_feedforward_layernorm\.input)",
}
_WRITES: dict[Site, str] = {"mlp_out": _INSIDE + r"(?:hook_mlp_out|mlp\.hook_out|post_feedforward_layernorm\.output)"}
"""Place → what releases call it."""


def mlp_sites(read: str, write: str, source: str) -> tuple[Site, Site]:
    """Where in its layer a transcoder reads and writes, by the names of its hooks; HookError for other places."""

    def place(hook: str, known: dict[Site, str], does: str) -> Site:
        for site in known:
            if re.fullmatch(known[site], hook):
                return site
        raise HookError(
            f"{source} {does} {hook!r}; demur takes transcoders that read the MLP's input (mlp.hook_in, "
            "pre_feedforward_layernorm.output) or the residual before its norm (hook_resid_mid), and write what the "
            "MLP adds to the residual (hook_mlp_out, mlp.hook_out, post_feedforward_layernorm.output)"
        )

    return place(read, _READS, "reads"), place(write, _WRITES, "writes")


def residual_layer(hook: str, source: str) -> int:
    """The decoder layer whose output a hook name means; HookError where it is not the residual stream between layers.
    `resid_pre` of layer `l` is the same tensor as `resid_post` of layer `l − 1` and is read as that."""
    if match := _POST.fullmatch(hook):
        return int(match[1] or match[2])
    if (match := _PRE.fullmatch(hook)) and int(match[1]) > 0:
        return int(match[1]) - 1
    raise HookError(
        f"{source} was trained on {hook!r}; demur needs SAEs of the residual stream after a decoder layer "
        "(blocks.L.hook_resid_post, or blocks.L+1.hook_resid_pre); choose another release."
    )
