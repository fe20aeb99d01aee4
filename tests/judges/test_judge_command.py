"""`demur judge` with judges that cost time or money."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from loopback import Reply, Request, loopback
from test_classifier_judges import wildguard

from command_line import run


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    texts = ("word word", "BAD", "word")
    path.write_text("\n".join(json.dumps({"prompt": "word", "response": text}) for text in texts))
    return path


def verdicts(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_classifier_from_a_folder(answers: Path, tmp_path: Path) -> None:
    folder, out = wildguard(tmp_path / "cls"), tmp_path / "v.jsonl"
    code, said, noted = run("judge", answers, "--judge", f"wildguard={folder}", "--device", "cpu", "--out", out)
    assert code == 0, noted
    assert [(v["outcome"], v["harmful"]) for v in verdicts(out)] == [
        ("refusal", False),
        ("compliance", True),
        ("refusal", False),
    ]
    assert "score" not in verdicts(out)[0]
    for line in ("refusal: 2 of 3", "compliance: 1 of 3", "harmful: 1 of 3", "not harmful: 2 of 3", "unscored: 0"):
        assert line in said
    # Nothing is loaded again: the verdicts are there, even when the weights are not.
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    code, _, noted = run("judge", answers, "--judge", f"wildguard={folder}", "--out", out)
    assert code == 2
    assert "cannot load the judge wildguard=cls" in noted  # Other content is another judge.
    (tmp_path / "elsewhere").rename(folder / "model.safetensors")
    code, _, noted = run("judge", answers, "--judge", f"wildguard={folder}", "--out", out)
    assert code == 0
    assert "3 answers were judged before" in noted


def test_an_endpoint_with_prices_a_failing_row_and_a_second_run(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-secret")
    out, healthy = tmp_path / "v.jsonl", False

    def answer(request: Request, _seen: int) -> Reply:
        return Reply("prompt too long", status=400) if "BAD" in request.asked and not healthy else Reply("Yes")

    with loopback(answer) as server:
        command = ("judge", answers, "--judge", "refusal=m", "--judge-url", server.url, "--out", out)
        code, said, noted = run(*command, "--prices", "2,30", "--concurrency", 1, "--requests-per-minute", 6000)
        assert code == 0
        assert [v["outcome"] for v in verdicts(out)] == ["refusal", None, "refusal"]
        assert "refusal: 2 of 3" in said
        assert "used: 3 requests, 200 tokens in, 20 out, cost 0.0010" in noted
        assert "warning: the judge failed on 1 of 3 answers; they are null. The same command asks only" in noted
        healthy = True
        code, said, noted = run(*command)
        assert (code, len(server.requests)) == (0, 4)
        assert "warning" not in noted
    assert [v["outcome"] for v in verdicts(out)] == ["refusal"] * 3
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer sk-not-a-secret"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "strongreject"], "needs a model: strongreject=MODEL"),
        (["--judge-url", "http://localhost:1/v1"], "the judge 'patterns' asks no endpoint"),
        (["--judge", "refusal=m", "--device", "cpu"], "has no model that runs here"),
        (["--judge", "refusal=m", "--prices", "cheap"], "--prices 'cheap': expected two numbers"),
        (["--judge", "refusal=m", "--judge-url", "localhost"], "'localhost' is no address"),
        (["--judge", "refusal=m", "--judge-url", "http://127.0.0.1:9/v1"], "nothing answers at the judge's endpoint"),
        (["--judge", "llama-gard-3"], "there is no judge 'llama-gard-3' (nearest: 'llama-guard-3')"),
    ],
)
def test_a_mistake_is_one_message(options: list[str], message: str, answers: Path, tmp_path: Path) -> None:
    code, _, noted = run("judge", answers, *options, "--out", tmp_path / "v.jsonl")
    assert code == 2
    assert noted.startswith("error: ")
    assert message in noted
    assert not (tmp_path / "v.jsonl").exists()


def test_naming_judges_loads_no_heavy_library() -> None:
    code = (
        "import sys, demur.judges as j\n"
        "for name in ('patterns', 'harmbench', 'wildguard', 'llama-guard-3', 'llama-guard-4', 'strongreject=m'):\n"
        "    j.get_judge(name)\n"
        "print([m for m in ('torch', 'transformers', 'httpx') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
