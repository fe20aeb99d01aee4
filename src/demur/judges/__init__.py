"""Judges: what an answer is, in four outcomes, and whether it is harmful; or unscored.

Importing this package imports neither torch, transformers nor httpx; the judges that need them do when they judge.
"""

from demur.judges._cached import CachedJudge, JudgedRows, judge_rows
from demur.judges._endpoint import Endpoint, Spent
from demur.judges._file import JudgeCounts, judge_file
from demur.judges._harmbench import HarmBenchJudge
from demur.judges._llama_guard import LlamaGuard4Judge, LlamaGuardJudge
from demur.judges._local import ClassifierJudge, Placement
from demur.judges._names import JUDGES, JudgeKind, get_judge
from demur.judges._patterns import PatternJudge
from demur.judges._protocol import Judge, JudgeStopped, Reading, Streaming, rules_digest
from demur.judges._rubric import LLMJudge, RefusalJudge, StrongRejectJudge
from demur.judges._wildguard import WildGuardJudge

__all__ = [
    "JUDGES",
    "CachedJudge",
    "ClassifierJudge",
    "Endpoint",
    "HarmBenchJudge",
    "Judge",
    "JudgeCounts",
    "JudgeKind",
    "JudgeStopped",
    "JudgedRows",
    "LLMJudge",
    "LlamaGuard4Judge",
    "LlamaGuardJudge",
    "PatternJudge",
    "Placement",
    "Reading",
    "RefusalJudge",
    "Spent",
    "Streaming",
    "StrongRejectJudge",
    "WildGuardJudge",
    "get_judge",
    "judge_file",
    "judge_rows",
    "rules_digest",
]
