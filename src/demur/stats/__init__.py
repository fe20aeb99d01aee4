"""Rates, means and differences with 95 % intervals, tests, and trade-off curves.

Outcomes are `True`, `False` or `None` (unscored: counted, never guessed); in arrays 1, 0 and nan. scipy is imported
only where it is used.
"""

from demur.stats._curves import CurveGap, TradeOff, area_under, compare_curves, value_at
from demur.stats._differences import (
    OneMoreDraw,
    PairedTest,
    crossed_difference,
    holm,
    mcnemar,
    one_more_draw,
    paired_difference,
    sign_flip_p,
)
from demur.stats._means import auroc, bootstrap_mean, mean_of_runs, spearman, spearman_over_prompts
from demur.stats._rates import Z_95, Estimate, clustered_rate, rate_of, wilson

__all__ = [
    "Z_95", "CurveGap", "Estimate", "OneMoreDraw", "PairedTest", "TradeOff", "area_under", "auroc", "bootstrap_mean",
    "clustered_rate", "compare_curves", "crossed_difference", "holm", "mcnemar", "mean_of_runs", "one_more_draw",
    "paired_difference", "rate_of", "sign_flip_p", "spearman", "spearman_over_prompts", "value_at", "wilson",
]  # fmt: skip
