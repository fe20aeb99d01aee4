"""The recipe of the bundled model: its world, its two stages of training, its SAEs, and what is measured of it.

`python -m recipes.bundled build DIR` makes everything in `demur/bundled/data` anew; `python -m recipes.bundled
evaluate` measures a built model. See `docs/bundled.md`.
"""
