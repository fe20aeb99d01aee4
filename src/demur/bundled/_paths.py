"""Where the bundled model's files are. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BundledPaths:
    """The files of a built model, below `root`."""

    root: Path

    @property
    def model(self) -> Path:
        """The chat model that refuses."""
        return self.root / "model"

    @property
    def helpful_model(self) -> Path:
        """The model after the helpful stage, before it learnt to refuse."""
        return self.root / "model-helpful"

    @property
    def saes(self) -> Path:
        """SAEs trained on the chat model."""
        return self.root / "saes"

    @property
    def base_saes(self) -> Path:
        """SAEs trained on the helpful-stage model."""
        return self.root / "saes-base"

    @property
    def metrics(self) -> Path:
        """The measured table, JSON."""
        return self.root / "metrics.json"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.root / "MODEL_CARD.md"


def bundled_path() -> BundledPaths:
    """The files installed with demur."""
    return BundledPaths(Path(__file__).parent / "data")


__all__ = ["BundledPaths", "bundled_path"]
