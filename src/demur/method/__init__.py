"""The method (paper §3): direction, attribution, selection, interventions and what they cost in likelihood."""
