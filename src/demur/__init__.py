"""demur: find, prove and use the SAE features that make a chat model refuse.

```python
import demur

model = demur.load_model()  # the bundled one; or demur.load_model("google/gemma-2-2b-it")
saes = demur.load_saes(model)
prompts = demur.load_prompts()
```

Importing this loads nothing heavy: each name is imported when it is first used.
"""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Final

__version__ = "0.1.0"

if TYPE_CHECKING:
    from demur.api import FoundFeatures, compare, explain, find_features, load_model, load_prompts, load_saes, run
    from demur.errors import DemurError
    from demur.judges import judge
    from demur.method.interventions import AblateDirection, AddDirection, ScaleFeatures, SetFeatures
    from demur.types import FeatureId, FeatureSet, Prompt, PromptSet

_ROOMS: Final = {
    "demur.api": (
        *("FoundFeatures", "compare", "explain", "find_features"),
        *("load_model", "load_prompts", "load_saes", "run"),
    ),
    "demur.errors": ("DemurError",),
    "demur.judges": ("judge",),
    "demur.method.interventions": ("AblateDirection", "AddDirection", "ScaleFeatures", "SetFeatures"),
    "demur.types": ("FeatureId", "FeatureSet", "Prompt", "PromptSet"),
}
_PLACES: Final = {name: room for room, names in _ROOMS.items() for name in names}
"""Name → module that holds it."""

__all__ = [
    "AblateDirection", "AddDirection", "DemurError", "FeatureId", "FeatureSet", "FoundFeatures", "Prompt", "PromptSet",
    "ScaleFeatures", "SetFeatures", "__version__", "compare", "explain", "find_features", "judge", "load_model",
    "load_prompts", "load_saes", "run",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _PLACES:
        value = getattr(import_module(_PLACES[name]), name)
        globals()[name] = value
        return value
    if name.startswith("__"):  # Asked for by Python itself.
        raise AttributeError(name)
    studies = import_module("demur.studies").STUDIES
    if name in studies:
        # `demur.benchmark(...)` is `demur.run("benchmark", ...)`.
        return partial(import_module("demur.api").run, name)
    raise AttributeError(f"demur has no {name!r}; it has {', '.join((*__all__, *studies))}")


def __dir__() -> list[str]:
    return sorted(__all__)
