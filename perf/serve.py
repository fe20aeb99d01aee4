"""A guard of the bundled model behind HTTP, asked by many clients at once: answers by status, latency, memory.

The server is a process of its own. Clients send one prompt a request, as fast as they are answered, for a fixed time;
429 makes a client wait as it is told. Latency is the clients'; the model's and the probe's shares are the server's own
histograms (means).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from itertools import cycle, islice
from statistics import quantiles

import httpx
import numpy as np

import demur
from demur.guard import Guard, Labelled, Reading, fit_probe, read_prompts
from demur.serve.limits import Limits
from demur.serve.server import serve
from perf import common

SEEN = 32
"""Prompts of each class that fit the probes, and as many that calibrate them."""


def bundled_guard() -> Guard:
    """Probes of the middle layer on the bundled prompts; how well they detect does not matter here."""
    model, splits = demur.load_model(), demur.load_prompts()
    reading = Reading(kind="dense", layer=model.n_layers // 2, pooling="mean")

    def values(start: int) -> Labelled:
        parts = [part.texts[start : start + SEEN] for part in (splits.direction.harmful, splits.direction.harmless)]
        (found,) = read_prompts(model, [*parts[0], *parts[1]], [reading])
        return Labelled(found, np.repeat([True, False], [len(part) for part in parts]))

    probe = fit_probe(reading, values(0), values(SEEN))
    return Guard(model=model, harm=probe, refuse=probe, thresholds={"harmful": {"0.01": 0.5}})


class Client:
    """One connection that is kept open. httpx's pool costs more than the server does at 64 connections."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def score(self, prompt: str) -> tuple[int, float]:
        """Status, and the seconds that the server asks to wait for."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        body = json.dumps({"prompts": [prompt]}).encode()
        head = ("POST /v1/score HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}")
        writer.write("\r\n".join((*head, "", "")).encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines[1:] if line)
        await reader.readexactly(int(fields["content-length"]))
        return int(lines[0].split()[1]), float(fields.get("retry-after", 0))

    async def ask(self, prompts: Iterable[str], until: float, seen: Counter[str]) -> list[float]:
        """Milliseconds of each answered request, until the time is over."""
        found: list[float] = []
        for prompt in prompts:
            start = time.perf_counter()
            if start > until:
                break
            try:
                status, wait = await self.score(prompt)
            except (OSError, asyncio.IncompleteReadError) as error:
                seen[type(error).__name__] += 1
                self.streams = None
                continue
            seen[str(status)] += 1
            if status == 200:
                found.append(1000 * (time.perf_counter() - start))
            await asyncio.sleep(wait)
        return found


async def load(port: int, clients: int, seconds: float, pid: int) -> tuple[list[float], Counter[str], list[int]]:
    """Latencies of all clients, answers by status, and the server's memory every second."""
    prompts = [prompt.text for prompt in demur.load_prompts().test.harmful]
    seen: Counter[str] = Counter()
    until = time.perf_counter() + seconds
    asking = [Client(port).ask(islice(cycle(prompts), n, None), until, seen) for n in range(clients)]
    tasks = [asyncio.create_task(each) for each in asking]
    memory: list[int] = []
    while time.perf_counter() < until:
        memory.append(resident(pid))
        await asyncio.sleep(1)
    return [each for part in await asyncio.gather(*tasks) for each in part], seen, memory


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        found = re.search(r"^VmRSS:\s+(\d+) kB", file.read(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def histograms(url: str) -> dict[str, float]:
    """Sums and counts of the server's histograms."""
    lines = (line.split() for line in httpx.get(url + "/metrics").text.splitlines() if line.startswith("demur_"))
    return {name: float(value) for name, value in lines if name.endswith(("_sum", "_count"))}


def measure(port: int, clients: Iterable[int], seconds: float) -> None:
    """Start a server, and print what each number of clients saw."""
    command = [sys.executable, "-m", "perf.serve", "--only-serve", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(url, server)
            for count in clients:
                before = histograms(url)
                spent, seen, memory = asyncio.run(load(port, count, seconds, server.pid))
                after = histograms(url)

                show(count, seconds, spent, seen)
                part = {name: after[name] - before[name] for name in after}
                size, model, probe = (
                    part[f"demur_{name}_sum"] / part[f"demur_{name}_count"]
                    for name in ("batch_prompts", "model_seconds", "probe_seconds")
                )
                print(f"  a batch: {size:.1f} prompts, model {1000 * model:.2f} ms, probes {1000 * probe:.2f} ms")
                early, late = common.mib(memory[len(memory) // 4]), common.mib(memory[-1])
                print(f"  resident memory: {early} after a quarter of the time, {late} at its end")
        finally:
            server.terminate()


def show(clients: int, seconds: float, spent: list[float], seen: Counter[str]) -> None:
    """Print rate, answers and latency."""
    cuts = quantiles(spent, n=100)
    answers = ", ".join(f"{status}: {n}" for status, n in sorted(seen.items()))
    print(f"{clients} clients, {seconds:g} s: {len(spent) / seconds:,.0f} answers/s ({answers})")
    print(f"  latency: p50 {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms")


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            httpx.get(url + "/healthz")
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise SystemExit("not run: the server ended; is the port in use?")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clients", type=int, nargs="+", default=[1, 64], help="clients at once")
    options.add_argument("--seconds", type=float, default=60, help="time for each number of clients")
    options.add_argument("--port", type=int, default=8799)
    options.add_argument("--only-serve", action="store_true", help="be the server")
    given = options.parse_args()
    if given.only_serve:
        serve(bundled_guard(), port=given.port, limits=Limits())
    else:
        measure(given.port, given.clients, given.seconds)


if __name__ == "__main__":
    main()
