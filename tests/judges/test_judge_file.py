from __future__ import annotations

import json
from pathlib import Path

import pytest
from loopback import Reply, Request, loopback

from demur.errors import InputError, RunError
from demur.judges import JudgeStopped, RefusalJudge, StrongRejectJudge, judge_file
from demur.types import Outcome

CSV = 'prompt,response\na,I cannot help with that.\nb,\nc,"Sure, here it is."\nd,Я не могу помочь\n'


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_per_row_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8")
    out = tmp_path / "verdicts.jsonl"
    counts = judge_file(tmp_path / "a.csv", judge="patterns", out=out)
    assert out.read_text().splitlines()[0] == '{"row": 0, "outcome": "refusal"}'
    assert lines(out) == [
        {"row": 0, "outcome": "refusal"},
        {"row": 1, "outcome": None},
        {"row": 2, "outcome": "compliance"},
        {"row": 3, "outcome": None},
    ]
    assert (counts.judge, counts.rows, counts.unscored, counts.without_answer) == ("patterns", 4, 2, 1)
    assert counts.outcomes[Outcome.REFUSAL] == counts.outcomes[Outcome.COMPLIANCE] == 1
    assert sum(counts.outcomes.values()) + counts.unscored == counts.rows


def test_named_columns_and_json_rows(tmp_path: Path) -> None:
    rows = [{"q": "a", "said": "I won't."}, {"q": "b", "said": None}, {"q": "c"}, {"q": "d", "said": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "v.jsonl"
    judge_file(tmp_path / "a.jsonl", judge="patterns", prompt_column="q", answer_column="Said", out=out)
    assert [line["outcome"] for line in lines(out)] == ["refusal", None, None, "incoherent"]


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(CSV, encoding="utf-8")
    out = tmp_path / "v.jsonl"
    with pytest.raises(InputError, match=r"no column 'respons' \(nearest: 'response'\)"):
        judge_file(path, judge="patterns", answer_column="respons", out=out)
    with pytest.raises(InputError, match="no judge 'llm'"):
        judge_file(path, judge="llm", out=out)
    with pytest.raises(InputError, match="is the file of answers itself"):
        judge_file(path, judge="patterns", out=path)
    with pytest.raises(RunError, match=r"v\.jsonl cannot be written"):
        judge_file(path, judge="patterns", out=tmp_path / "no" / "v.jsonl")
    (tmp_path / "b.csv").write_text("prompt,response\n")
    with pytest.raises(InputError, match="no rows to judge"):
        judge_file(tmp_path / "b.csv", judge="patterns", out=out)
    (tmp_path / "c.json").write_text('[{"prompt": "a", "response": 3}]')
    with pytest.raises(InputError, match="row 0, column 'response': expected text, found 3"):
        judge_file(tmp_path / "c.json", judge="patterns", out=out)
    assert not out.exists()
    assert path.read_text(encoding="utf-8") == CSV


def test_a_judge_of_harm_adds_its_fields_to_every_line(tmp_path: Path) -> None:
    def answer(request: Request, _seen: int) -> Reply:
        if "broken" in request.asked:
            return Reply(status=500)
        return Reply("1.b 0\n2.b 5\n3.b 4" if "Sure" in request.asked else "1.b 1\n2.b 1\n3.b 1")

    rows = [{"prompt": "a", "response": text} for text in ("Sure.", "No.", None, "broken", "Sure.")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "v.jsonl"
    with loopback(answer) as server:
        judge = StrongRejectJudge("m", server.endpoint(attempts=2))
        counts = judge_file(tmp_path / "a.jsonl", judge=judge, out=out)
        assert len(server.requests) == 2 + 2  # Two answers once, though one stands there twice; one that fails twice.
    assert lines(out) == [
        {"row": 0, "outcome": None, "harmful": True, "score": 0.875},
        {"row": 1, "outcome": None, "harmful": False, "score": 0.0},
        {"row": 2, "outcome": None, "harmful": None, "score": None},
        {"row": 3, "outcome": None, "harmful": None, "score": None},
        {"row": 4, "outcome": None, "harmful": True, "score": 0.875},
    ]
    assert (counts.harmful, counts.not_harmful, counts.unscored, counts.without_answer) == (2, 1, 2, 1)
    assert (counts.failed, counts.gives) == (1, ("harmful", "score"))
    assert counts.usage == "4 requests, 200 tokens in, 20 out"


def test_the_same_call_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": f"answer {n}"} for n in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, healthy = tmp_path / "v.jsonl", False

    def answer(request: Request, _seen: int) -> Reply:
        return Reply(status=404) if "answer 4" in request.asked and not healthy else Reply("No")

    with loopback(answer) as server:
        judge = RefusalJudge("m", server.endpoint(concurrency=1))
        with pytest.raises(JudgeStopped, match=r"HTTP 404.*\n4 of 6 answers are judged and kept in .*v\.jsonl\.cache"):
            judge_file(tmp_path / "a.jsonl", judge=judge, out=out)
        assert not out.exists()
        healthy = True
        server.requests.clear()
        counts = judge_file(tmp_path / "a.jsonl", judge=judge, out=out)
        assert sorted(request.asked.split("answer ")[1][0] for request in server.requests) == ["4", "5"]
    assert (counts.cached, counts.unscored, counts.outcomes[Outcome.COMPLIANCE]) == (4, 0, 6)
    assert len(lines(out)) == 6


def test_a_judge_that_costs_nothing_leaves_nothing_beside_its_verdicts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8")
    counts = judge_file(tmp_path / "a.csv", judge="patterns", out=tmp_path / "v.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "v.jsonl"]
    assert (counts.cache, counts.usage) == (None, None)


def test_halves_of_surrogate_pairs_can_be_judged(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "\\ud83d", "response": "Sure, here it is \\udc00."}]')
    out = tmp_path / "v.jsonl"
    with loopback(lambda _request, _seen: Reply("No")) as server:
        judge_file(tmp_path / "a.json", judge=RefusalJudge("m", server.endpoint()), out=out)
    judge_file(tmp_path / "a.json", judge="patterns", out=out)
    assert lines(out) == [{"row": 0, "outcome": "compliance"}]
