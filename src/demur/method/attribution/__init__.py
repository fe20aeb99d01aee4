"""Which features move the answer: gradient, integrated gradients and exact patching behind one signature."""

from demur.method.attribution._dictionary import DictionaryAttribution, attribute_dictionary
from demur.method.attribution._pool import PoolIndices, attribute, attribute_batches, pool_features
from demur.method.attribution._values import (
    Attribution,
    AttributionSpec,
    Estimator,
    Method,
    Metric,
    PromptAttribution,
    ScoredTokens,
    estimator,
)

__all__ = [
    "Attribution",
    "AttributionSpec",
    "DictionaryAttribution",
    "Estimator",
    "Method",
    "Metric",
    "PoolIndices",
    "PromptAttribution",
    "ScoredTokens",
    "attribute",
    "attribute_batches",
    "attribute_dictionary",
    "estimator",
    "pool_features",
]
