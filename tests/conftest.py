"""Shape and type checking of the whole package under test, the options, and the markers' skips."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One process a core, one thread each: small models gain nothing from threads, and threads that wait for one another on
# a busy machine make the tests fifty times slower. Set before torch is imported, and for subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# It reads HF_HUB_OFFLINE when it is first imported, which must not be in a test that sets the variable for itself.
import huggingface_hub.constants  # noqa: F401
import pytest
from hypothesis import settings

import runtime_checks

# Until the tests are collected: what importing makes stays, and looking through it again and again takes a fifth of the
# time.
gc.disable()

# What fsync is for, a power cut, no test makes; a small study waits for it half of its time on a busy disk.
os.fsync = lambda _descriptor: None

# Before anything imports demur: the first calls of every annotated function are then checked in each test.
runtime_checks.install("demur")

# Shared machines stall for seconds; a deadline would report that as a failure of the code.
settings.register_profile("demur", deadline=None, max_examples=50)
settings.load_profile("demur")

LONG = {"studies", "capability", "saes", "serve", "test_extending.py", "test_docs.py", "test_plan.py", "test_golden.py"}

CHECKOUT = Path(__file__).resolve().parents[1]


def shared_folder() -> Path | None:
    """The developers' shared folder: `DEMUR_SHARED`, or `../shared` beside the checkout."""
    folder = Path(os.environ.get("DEMUR_SHARED") or CHECKOUT.parent / "shared")
    return folder if (folder / "data" / "INDEX.tsv").is_file() else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def _cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Whole studies first: a long file that starts last keeps one process busy while the others are done.
    items.sort(key=lambda item: LONG.isdisjoint(item.path.parts))

    def skip(marker: str, reason: str) -> None:
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))

    if not config.getoption("--slow"):
        skip("slow", "slow: run with --slow")
    if shared_folder() is None:
        skip("shared", "no shared folder: put it at ../shared beside the checkout, or set DEMUR_SHARED")
    if importlib.util.find_spec("sae_lens") is None:
        skip("saelens", "SAELens is not installed: pip install 'demur[saelens]'")
    if importlib.util.find_spec("lm_eval") is None:
        skip("eval", "lm-evaluation-harness is not installed: pip install 'demur[eval]'")
    if any(item.get_closest_marker("gpu") for item in items) and not _cuda_is_there():
        skip("gpu", "no CUDA device")


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(autouse=True)
def types_are_checked() -> None:
    runtime_checks.start_test()


@pytest.fixture(autouse=True)
def registries_as_before() -> Iterator[None]:
    """What a test registers is gone when it ends: test files share a process, in an order that changes."""
    from demur.data.named_sets import PROMPT_SETS
    from demur.judges import JUDGES
    from demur.registry import Registry
    from demur.saes.layouts import LAYOUTS
    from demur.studies import STUDIES
    from demur.studies.methods import METHODS

    registries: list[Registry[Any]] = [STUDIES, METHODS, JUDGES, LAYOUTS, PROMPT_SETS]
    before = [dict(registry.registered) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        for name in registry.registered.keys() - entries.keys():
            registry.unregister(name)
        for name, entry in entries.items():
            registry.register(name, entry)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' shared folder. Tests that use it are marked `shared`, which skips without it."""
    folder = shared_folder()
    if folder is None:
        pytest.fail("a test that uses the `shared` fixture must be marked `shared`")
    return folder
