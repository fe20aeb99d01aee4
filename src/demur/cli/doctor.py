"""Check versions, devices and memory, and say which number format suits; exits with 1 if something is broken."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

import click

from demur import __version__
from demur.cli.console import console


class Finding(NamedTuple):
    """One line: what was looked at, what was found, and whether it is as it should be."""

    name: str
    text: str
    good: bool = True


@click.command(help=__doc__)
@click.option("--online", is_flag=True, help="Also ask the Hugging Face hub.")
def command(online: bool) -> None:
    from rich.table import Table

    findings = [*_software(), *_machine(), _bundled()]
    if online:
        findings.append(_hub())
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        table.add_row("ok" if finding.good else "BAD", finding.name, finding.text)
    console().print(table)
    if not all(finding.good for finding in findings):
        raise click.exceptions.Exit(1)


def _software() -> Iterator[Finding]:
    yield Finding("demur", __version__)
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    extras: dict[str, list[str]] = {}
    for requirement in requires("demur") or ():
        name, _, condition = requirement.partition(";")
        package = re.split(r"[^\w.-]", name.strip(), maxsplit=1)[0]
        if found := re.search(r"extra == ['\"](.+)['\"]", condition):
            extras.setdefault(found[1], []).append(package)
        else:
            text = _version(package)
            yield Finding(package, text or "not installed; reinstall demur", good=text is not None)
    extras.pop("dev", None)
    for extra, packages in extras.items():
        here = all(map(_version, packages))
        missing = f"not installed (optional: pip install 'demur[{extra}]')"
        yield Finding(f"extra {extra}", "installed" if here else missing)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> Iterator[Finding]:
    import torch

    memory = _memory_bytes()
    known = "" if memory is None else f", {memory / 1e9:.1f} GB of memory"
    yield Finding("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} used{known}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"cuda:{index}", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    if torch.backends.mps.is_available():
        yield Finding("mps", "available")
    cuda = torch.cuda.is_available()
    bfloat16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    yield Finding("number format", _dtype_advice(cuda, bfloat16))


def _bundled() -> Finding:
    """Whether the bundled model's files are those that its card lists."""
    from demur.bundled import bundled_path

    paths = bundled_path()
    if not paths.card.is_file():
        return Finding("bundled model", f"not installed: no {paths.card}; reinstall demur", good=False)
    wanted = set(re.findall(r"\b[0-9a-f]{64}\b", paths.card.read_text(encoding="utf-8")))
    folders = (paths.model, paths.helpful_model, paths.saes, paths.base_saes)
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    found = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    altered = [path for path, digest in found.items() if digest not in wanted]
    missing = len(wanted - set(found.values()))
    if altered or missing:
        names = ", ".join(path.relative_to(paths.root).as_posix() for path in altered)
        text = f"{len(altered)} files are not those of its card ({names}), {missing} of the card's are missing"
        return Finding("bundled model", f"{text}; reinstall demur", good=False)
    return Finding("bundled model", f"intact, {paths.root}")


def _dtype_advice(cuda: bool, bfloat16: bool) -> str:
    if not cuda:
        return "float32: exact, and as fast as any on most CPUs; bfloat16 halves the memory of a large model"
    if bfloat16:
        return "bfloat16; float32 where results are compared to the last digit"
    return "float32, or float16 where memory is short (this GPU has no bfloat16; Gemma 3 cannot run in float16)"


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _hub() -> Finding:
    import httpx
    from huggingface_hub import constants

    try:
        answer = httpx.get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=10, follow_redirects=True)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        return Finding("hub", f"{constants.ENDPOINT} cannot be reached: {error}", good=False)
    return Finding("hub", f"{constants.ENDPOINT} answers")
