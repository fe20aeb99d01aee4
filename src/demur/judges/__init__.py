"""Judges: what an answer is, in four outcomes, and whether it is harmful; or unscored. Importing this package imports
neither torch, transformers nor openai; the judges that need them do when they judge."""

from demur.judges._base import Judge, JudgeStopped, Reading, StreamingJudge, Usage, rules_digest
from demur.judges._classifier import (
    ClassifierJudge,
    HarmBenchJudge,
    LlamaGuard4Judge,
    LlamaGuardJudge,
    Placement,
    WildGuardJudge,
)
from demur.judges._endpoint import ChatClient, Endpoint, LLMJudge, RefusalJudge, RowFailedError, StrongRejectJudge
from demur.judges._file import JudgeCounts, judge_file
from demur.judges._judgement import JUDGES, CachedJudge, Judgement, get_judge, judge
from demur.judges._likelihood import Coherence, CoherentJudge
from demur.judges._patterns import PatternJudge

__all__ = [
    "JUDGES", "CachedJudge", "ChatClient", "ClassifierJudge", "Coherence", "CoherentJudge", "Endpoint",
    "HarmBenchJudge", "Judge", "JudgeCounts", "JudgeStopped", "Judgement", "LLMJudge", "LlamaGuard4Judge",
    "LlamaGuardJudge", "PatternJudge", "Placement", "Reading", "RefusalJudge", "RowFailedError",
    "StreamingJudge", "StrongRejectJudge", "Usage", "WildGuardJudge", "get_judge", "judge", "judge_file",
    "rules_digest",
]  # fmt: skip
