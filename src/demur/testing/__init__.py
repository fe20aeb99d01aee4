"""Models with known properties, for tests and for measuring methods against the truth.

- `tiny_model(family)`: a random model of a real class (`FAMILIES`) with a tokenizer of its kind; `save_tiny` writes it
  to a folder; `tiny_suite(model)`: random SAEs that fit it. `SLIDING_WINDOW`: tokens that its sliding layers see.
- `planted()`: a model and a dictionary built by hand, whose causal features are known (`Planted`, `Truth`);
  `docs/explanation/planted.md` tells how.

`recipes/testing.py` made its tokenizers.
"""

from demur.testing._planted import Planted, Truth, planted
from demur.testing._tiny import FAMILIES, SLIDING_WINDOW, Family, save_tiny, tiny_model, tiny_suite

__all__ = [
    "FAMILIES", "SLIDING_WINDOW", "Family", "Planted", "Truth", "planted", "save_tiny", "tiny_model", "tiny_suite",
]  # fmt: skip
