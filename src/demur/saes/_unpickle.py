"""`python _unpickle.py FILE OUT BYTES SECONDS`: the tensors and numbers of a pickled checkpoint as safetensors.
A process of its own, because what it reads may be hostile: `torch.load` with `weights_only` runs none of its code, and
memory and time are limited. What is wrong is printed."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast


def main(file: str, out: str, size: int, seconds: int) -> None:
    import torch
    from safetensors.torch import save_file

    with contextlib.suppress(ImportError, ValueError):  # Windows has none, and a system may allow less already.
        import resource

        most = _mapped() + size
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
        found = {name: torch.as_tensor(value).float().contiguous().clone() for name, value in _numbers(loaded)}
        save_file(found, out)
    except Exception as error:  # unpickling a file that is none raises anything
        # PyTorch's own advice, before the reason, is to load it unsafely.
        reason = re.search(r"Unsupported [^\n]+|Trying to load unsupported GLOBAL \S+", str(error))
        print(reason[0] if reason else (str(error).strip().splitlines() or [type(error).__name__])[0])  # noqa: T201
        sys.exit(1)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and numbers in nested mappings, by dotted names."""
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[object, Any]", value).items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif hasattr(value, "shape") or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield name or "value", value


def _mapped() -> int:
    """Bytes that this process has mapped already, libraries for the most part."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * 4096
    except OSError:
        return 1 << 34


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
