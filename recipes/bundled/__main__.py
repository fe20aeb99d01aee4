"""`python -m recipes.bundled`: build the bundled model anew, or measure it."""

from __future__ import annotations

import argparse
import logging

from recipes.bundled.metrics import BundledMetrics, checks


def _table(metrics: BundledMetrics) -> str:
    rows = [(check.name, check.wanted, check.measured, "met" if check.met else "missed") for check in checks(metrics)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m recipes.bundled", description="The bundled model.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="train the model and its SAEs (20 minutes; needs demur[saelens])")
    build.add_argument("out", help="folder to make")
    build.add_argument("--seed", type=int, default=0, help="seed of everything")
    evaluate = commands.add_parser("evaluate", help="measure a built model on held-out prompts")
    evaluate.add_argument("path", nargs="?", help="folder of a built model (default: the installed one)")
    evaluate.add_argument("--seed", type=int, default=41, help="draws the held-out prompts (default: the model card's)")
    evaluate.add_argument("--json", action="store_true", help="print the measurements as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    options = _options(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("recipes").setLevel(logging.INFO)
    if options.command == "build":
        from recipes.bundled.build import build

        metrics = build(options.out, options.seed)
    else:
        from recipes.bundled.evaluate import evaluate

        metrics = evaluate(options.path, options.seed)
    print(metrics.model_dump_json(indent=1) if options.command == "evaluate" and options.json else _table(metrics))


if __name__ == "__main__":
    main()
