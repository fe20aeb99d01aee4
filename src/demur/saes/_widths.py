"""Numbers of features and layers as people write them."""

from __future__ import annotations

from collections.abc import Sequence


def width_name(d_sae: int) -> str:
    """`d_sae` as Gemma Scope writes it: `16k` for 16,384, `1m` for 1,048,576; other numbers in full."""
    if d_sae >= 1024 and d_sae.bit_count() == 1:
        return f"{d_sae // 1_000_000}m" if d_sae >= 1_000_000 else f"{d_sae // 1000}k"
    return str(d_sae)


_WIDTHS = {width_name(1 << power): 1 << power for power in range(10, 24)}


def width_number(name: str) -> int | None:
    """The number of features that a width name stands for; None when it stands for none."""
    return int(name) if name.isdigit() else _WIDTHS.get(name.lower())


def spans(numbers: Sequence[int]) -> str:
    """`0–25`, or `0–3, 7, 9–11`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts) or "none"
