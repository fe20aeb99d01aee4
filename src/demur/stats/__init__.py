"""Rates, means and differences with 95 % intervals, tests, and trade-off curves.

Outcomes are `True`, `False` or `None` (unscored: counted, never guessed); in arrays 1, 0 and nan. scipy is imported
only where it is used.
"""

from demur.stats._numbers import (
    CurveGap,
    TradeOff,
    area_under,
    auroc,
    bootstrap_mean,
    compare_curves,
    mean_of_runs,
    spearman,
    spearman_over_prompts,
    value_at,
)  # fmt: skip
from demur.stats._outcomes import (
    Z_95,
    Estimate,
    OneMoreDraw,
    PairedTest,
    clustered_rate,
    crossed_difference,
    holm,
    mcnemar,
    one_more_draw,
    paired_difference,
    rate_of,
    sign_flip_p,
    wilson,
)  # fmt: skip

__all__ = [
    "Z_95", "CurveGap", "Estimate", "OneMoreDraw", "PairedTest", "TradeOff", "area_under", "auroc", "bootstrap_mean",
    "clustered_rate", "compare_curves", "crossed_difference", "holm", "mcnemar", "mean_of_runs", "one_more_draw",
    "paired_difference", "rate_of", "sign_flip_p", "spearman", "spearman_over_prompts", "value_at", "wilson",
]  # fmt: skip
