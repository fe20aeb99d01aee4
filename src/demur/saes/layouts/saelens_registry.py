"""Everything else that SAELens can load: `saelens:RELEASE` or `saelens:RELEASE/SAE_ID`.

The optional extra does it: SAELens downloads and converts; what it gives is folded as a SAELens folder is. It reads
whole SAEs into memory, one layer at a time, and always the newest revision.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from demur.errors import SaeError
from demur.saes._array_files import Arrays, memory_array
from demur.saes._canonical import SaeWeights
from demur.saes._features import width_number
from demur.saes._files import Config, SaeFiles, first_line
from demur.saes._sae import Sae
from demur.saes.layouts import FoundSae, Layout, residual_layer
from demur.saes.layouts.saelens import HOOK_FIELDS, described, saelens_convention

if TYPE_CHECKING:
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

PREFIX = "saelens:"
_LAYER = re.compile(r"(?:layer[_.]?|blocks\.|^l)(\d+)")
_WIDTH = re.compile(r"width_(\w+?)(?:_l0|/|$)")


class SaeLensRelease(SaeFiles):
    """A release of the SAELens registry: its `files` are the ids of SAEs, with the prefix."""

    def __init__(self, source: str) -> None:
        try:
            with warnings.catch_warnings(action="ignore"):
                import sae_lens
        except ImportError as error:
            raise SaeError(f"{PREFIX} sources need SAELens: pip install 'demur[saelens]'") from error
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        self._saelens: Any = sae_lens
        self.release, _, wanted = source.removeprefix(PREFIX).partition("/")
        self.name = f"{PREFIX}{self.release}"
        directory = get_pretrained_saes_directory()
        if self.release not in directory:
            raise SaeError(f"SAELens has no release {self.release!r}; {_nearest(self.release, list(directory))}")
        self.lookup: PretrainedSAELookup = directory[self.release]
        ids = list(self.lookup.saes_map)
        if wanted and wanted not in ids:
            raise SaeError(f"SAELens release {self.release} has no SAE {wanted!r}; {_nearest(wanted, ids)}")
        self.files = tuple(PREFIX + each for each in ([wanted] if wanted else ids))

    def is_here(self, file: str) -> bool:  # noqa: ARG002
        return False

    def identity(self, file: str) -> str:
        return f"{self.name}/{file}:sae-lens={self._saelens.__version__}"

    def config(self, file: str) -> Config:
        from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

        with _named_errors(f"{self.name}/{file}: SAELens cannot read its configuration"):
            return Config(f"{self.name}/{file}", load_sae_config_from_huggingface(self.release, file))

    def load(self, file: str) -> tuple[Config, Arrays]:
        """The configuration and the arrays of an SAE after SAELens has converted it."""
        source = f"{self.name}/{file}"
        with _named_errors(f"{source}: SAELens cannot load it"), warnings.catch_warnings(action="ignore"):
            sae = self._saelens.SAE.from_pretrained(self.release, file, device="cpu", dtype="float32")
        state = {name: memory_array(source, name, tensor) for name, tensor in sae.state_dict().items()}
        return Config(source, sae.cfg.to_dict()), Arrays(source, state)


@dataclass(frozen=True)
class _RegistrySae(FoundSae):
    """Its configuration may be a download, so it is read only when the SAE has been chosen."""

    files: SaeLensRelease

    def open(self) -> SaeWeights:
        config, arrays = self.files.load(self.weights)
        # A factor that SAELens knows is folded in by now, as the configuration says; without one it is refused.
        return SaeWeights.of(arrays, saelens_convention(config, norm_factor=None))

    def sae(self) -> Sae:
        # SAELens has the factor and folds it in on loading; 1 stands for it here, where only the form matters.
        return FoundSae.sae(replace(self, **described(self.files.config(self.weights), norm_factor=1.0)))


def _describe(files: SaeFiles, match: re.Match[str]) -> FoundSae | None:
    if not isinstance(files, SaeLensRelease):
        return None
    sae_id = match[1]
    named, width = _LAYER.search(sae_id), _WIDTH.search(sae_id)
    # Names give the layer without a download; without one the configuration must be fetched now.
    hook = f"blocks.{named[1]}.hook_resid_post" if named else files.config(sae_id).text(*HOOK_FIELDS)
    return _RegistrySae(
        files,
        sae_id,
        layer=residual_layer(hook, f"{files.name}/{sae_id}"),
        d_sae=width_number(width[1]) if width else None,
        average_l0=files.lookup.expected_l0.get(sae_id) or None,
    )


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # downloads and parsing: SAELens lets every library's own errors through
        raise SaeError(f"{what} ({first_line(error)})") from error


def _nearest(wanted: str, names: list[str]) -> str:
    return f"the nearest are {', '.join(difflib.get_close_matches(wanted, names, n=3, cutoff=0.0))}"


SAELENS_REGISTRY = Layout(f"SAELens registry ({PREFIX}RELEASE or {PREFIX}RELEASE/SAE_ID)", rf"{PREFIX}(.+)", _describe)
