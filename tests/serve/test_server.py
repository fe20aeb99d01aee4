"""The server: what each endpoint answers, and how it refuses what it cannot take on."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from openai import OpenAI, RateLimitError
from serving import Serve, Slow

from demur.errors import InputError
from demur.guard import Guard
from demur.serve.server import serve as run_server
from demur.testing import Planted


def post(url: str, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=30, **options)


def told(reply: httpx.Response) -> str:
    return reply.json()["error"]["message"]


def wait_for_queue(url: str, prompts: int) -> None:
    """Until so many prompts wait, as the metrics say."""
    line = f"demur_waiting_prompts {float(prompts)}"
    deadline = time.monotonic() + 20
    while line not in httpx.get(url + "/metrics").text.splitlines():
        assert time.monotonic() < deadline, f"never {prompts} prompts in the queue"
        time.sleep(0.01)


def test_scores_are_the_guards_own_in_order(serve: Serve, guard: Guard, truth: Planted) -> None:
    texts = [truth.harmful.texts[60], truth.harmless.texts[60], truth.harmful.texts[61]]
    reply = post(serve(guard).url, "/v1/score", {"prompts": texts})
    assert reply.status_code == 200
    found = reply.json()
    assert [each["row"] for each in found["results"]] == [0, 1, 2]
    assert [each["flagged"] for each in found["results"]] == [True, False, True]
    for each, expected in zip(found["results"], guard.score(texts), strict=True):
        assert each["harmful"] == pytest.approx(expected.harmful, abs=1e-5)
        assert each["refuse"] == pytest.approx(expected.refuse, abs=1e-5)
        assert each["verdict"] == expected.verdict
    assert reply.headers["x-request-id"] == found["id"]


def test_an_explanation_is_the_guards_own(serve: Serve, guard: Guard, truth: Planted) -> None:
    text = truth.harmful.texts[60]
    found = post(serve(guard).url, "/v1/explain", {"prompt": text}).json()
    expected = guard.explain(text).model_dump(mode="json")
    assert [each["text"] for each in found["tokens"]] == [each["text"] for each in expected["tokens"]]
    assert found["features"] == expected["features"]


def test_the_openai_client_uses_the_moderation_endpoint_unchanged(serve: Serve, guard: Guard, truth: Planted) -> None:
    served = serve(guard, key="sk-own")
    client = OpenAI(base_url=f"{served.url}/v1", api_key="sk-own", max_retries=0)
    found = client.moderations.create(input=[truth.harmful.texts[60], truth.harmless.texts[60]])
    assert [each.flagged for each in found.results] == [True, False]
    first = found.results[0]
    assert first.categories.illicit is True
    assert first.category_scores.illicit == pytest.approx(guard.score([truth.harmful.texts[60]])[0].harmful, abs=1e-5)
    # Every category that the client declares is there, with an answer of the right type.
    for part in (first.categories, first.category_scores, first.category_applied_input_types):
        declared = {each.alias or name for name, each in type(part).model_fields.items()}
        assert set(part.model_dump(by_alias=True)) == declared
    assert [name for name, value in first.categories.model_dump(by_alias=True).items() if value] == ["illicit"]
    assert client.moderations.create(input=truth.harmless.texts[60]).results[0].flagged is False
    parts: Any = [{"type": "text", "text": truth.harmful.texts[60]}]
    assert client.moderations.create(input=parts).results[0].flagged is True
    image = post(served.url, "/v1/moderations", {"input": [{"type": "image_url"}]}, headers={"x-api-key": "sk-own"})
    assert (image.status_code, "image_url" in told(image)) == (400, True)


def test_litellms_request_is_blocked_or_let_through(serve: Serve, guard: Guard, truth: Planted) -> None:
    url, path = serve(guard).url, "/beta/litellm_basic_guardrail_api"
    harmful, harmless = truth.harmful.texts[60], truth.harmless.texts[60]
    asked = {"input_type": "request", "texts": [harmful], "request_data": {"user_api_key_hash": "x"}, "images": None}
    found = post(url, path, asked).json()
    assert found["action"] == "BLOCKED"
    assert "flagged as harmful" in found["blocked_reason"]
    assert harmful not in found["blocked_reason"]
    assert post(url, path, {"texts": [harmless], "litellm_call_id": "1"}).json() == {"action": "NONE"}
    # Only what users wrote is scored: a system message may name what is forbidden.
    roles = [{"role": "system", "content": harmful}, {"role": "user", "content": [{"type": "text", "text": harmless}]}]
    assert post(url, path, {"texts": [harmful, harmless], "structured_messages": roles}).json() == {"action": "NONE"}
    assert post(url, path, {"texts": []}).json() == {"action": "NONE"}
    answer = post(url, path, {"input_type": "response", "texts": [harmful]})
    assert (answer.status_code, "pre_call" in told(answer)) == (400, True)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/score", {"prompts": []}, 422, "prompts: List should have at least 1 item"),
        ("/v1/score", {"prompts": ["a", "  "]}, 422, "prompt 1 is empty"),
        ("/v1/score", {"prompts": ["a"] * 9}, 413, "9 prompts in one request; at most 8"),
        ("/v1/score", {"prompts": ["word " * 200]}, 413, "at most 64 are read"),
        ("/v1/explain", {"prompt": "word " * 200}, 413, "at most 64 are read"),
        ("/v1/explain", {"prompt": " "}, 422, "is empty"),
        ("/v1/score", {"prompts": ["x" * 3000]}, 413, "at most 2000 are read"),
        ("/v1/score", {"promts": ["a"]}, 422, "prompts: Field required"),
        ("/v1/score", [1], 422, "valid dictionary"),
    ],
)
def test_what_does_not_fit_is_told(serve: Serve, guard: Guard, path: str, body: Any, status: int, message: str) -> None:
    reply = post(serve(guard, max_prompts=8, max_body=2000, max_tokens=64).url, path, body)
    assert reply.status_code == status
    assert message in told(reply)


def test_a_long_prompt_does_not_harm_its_neighbours(serve: Serve, truth: Planted, slow: Slow) -> None:
    served = serve(slow, max_tokens=64)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, served.url, "/v1/score", {"prompts": [truth.harmless.texts[60]]})
        assert slow.started.wait(10)
        # Both wait for the next batch, together.
        long = pool.submit(post, served.url, "/v1/score", {"prompts": ["word " * 100]})
        good = pool.submit(post, served.url, "/v1/score", {"prompts": [truth.harmful.texts[60]]})
        wait_for_queue(served.url, 2)
        slow.go.set()
        assert [each.result().status_code for each in (first, long, good)] == [200, 413, 200]
    assert good.result().json()["results"][0]["flagged"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"prompts": ["a"', b"null"])
def test_malformed_bodies_are_answered(serve: Serve, guard: Guard, body: bytes) -> None:
    url = serve(guard).url
    reply = httpx.post(url + "/v1/score", content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (400, 422)
    assert reply.json()["error"]["code"] == reply.status_code
    assert httpx.get(url + "/healthz").json()["status"] == "ok"


def test_a_wrong_key_is_refused_before_the_body_is_read(serve: Serve, guard: Guard) -> None:
    url = serve(guard, key="right").url
    for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}):
        reply = post(url, "/v1/score", {"prompts": ["a"]}, headers=headers)
        assert (reply.status_code, "API key" in told(reply)) == (401, True)
    for headers in ({"x-api-key": "right"}, {"authorization": "Bearer right"}):
        assert post(url, "/v1/score", {"prompts": ["a"]}, headers=headers).status_code == 200
    assert httpx.get(url + "/metrics").status_code == 401
    assert httpx.get(url + "/healthz").status_code == 200


def test_a_full_queue_says_when_to_come_back(serve: Serve, slow: Slow, truth: Planted) -> None:
    served = serve(slow, queue=3, max_batch=2)
    text = truth.harmless.texts[60]
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, served.url, "/v1/score", {"prompts": [text]})
        assert slow.started.wait(10)
        waiting = pool.submit(post, served.url, "/v1/score", {"prompts": [text, text]})
        wait_for_queue(served.url, 2)
        full = post(served.url, "/v1/score", {"prompts": [text, text]})
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        with pytest.raises(RateLimitError):
            OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0).moderations.create(input=[text, text])
        slow.go.set()
        assert [first.result().status_code, waiting.result().status_code] == [200, 200]
    # What waited was scored in one pass.
    assert slow.batches == [1, 2]


def test_a_request_that_takes_too_long_is_given_up_and_not_scored(serve: Serve, slow: Slow, truth: Planted) -> None:
    served = serve(slow, timeout=0.5)
    text = truth.harmless.texts[60]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, served.url, "/v1/score", {"prompts": [text]})
        assert slow.started.wait(10)
        late = post(served.url, "/v1/score", {"prompts": [text, text]})
        assert (late.status_code, first.result().status_code) == (503, 503)
    slow.go.set()
    assert post(served.url, "/v1/score", {"prompts": [text]}).status_code == 200
    # The two that nobody waited for any more were left out.
    assert slow.batches == [1, 1]


def raw(port: int, sent: bytes, *, wait: float) -> tuple[bytes, float]:
    """What a server says to some bytes, and after how many seconds it closed the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        start = time.monotonic()
        connection.sendall(sent)
        found = b""
        while part := connection.recv(65536):
            found += part
        return found, time.monotonic() - start


def test_slow_heads_are_dropped_and_slow_bodies_answered(serve: Serve, guard: Guard) -> None:
    served = serve(guard, head_timeout=0.5, timeout=0.6)
    for head in (b"", b"POST /v1/score HT", b"POST /v1/score HTTP/1.1\r\nHost: x\r\n"):
        found, seconds = raw(served.port, head, wait=10)
        assert found == b""
        assert 0.4 < seconds < 5
    half = b'POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"pro'
    found, seconds = raw(served.port, half, wait=10)
    assert found.startswith(b"HTTP/1.1 408")
    assert 0.5 < seconds < 5
    assert httpx.get(served.url + "/healthz").status_code == 200


def test_a_drip_of_bytes_buys_no_time(serve: Serve, guard: Guard) -> None:
    served = serve(guard, head_timeout=0.6)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        start, closed = time.monotonic(), False
        for byte in b"POST /v1/score HTTP/1.1\r\n" + b"X-Filler: a\r\n" * 50:
            try:
                connection.sendall(bytes([byte]))
            except (BrokenPipeError, ConnectionResetError):
                closed = True
                break
            time.sleep(0.05)
        assert closed
        assert time.monotonic() - start < 5


def test_bytes_that_are_not_http_and_clients_that_vanish_leave_no_trace(serve: Serve, guard: Guard) -> None:
    served = serve(guard)
    assert raw(served.port, b"\x16\x03\x01 nothing\r\n\r\n", wait=10)[0].startswith(b"HTTP/1.1 400")
    for sent in (b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", b"GET /"):
        connection = socket.create_connection(("127.0.0.1", served.port))
        connection.sendall(sent)
        connection.close()
    assert post(served.url, "/v1/score", {"prompts": ["a"]}).status_code == 200
    deadline = time.monotonic() + 5
    while served.server.server_state.connections and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not served.server.server_state.connections


def test_a_body_without_a_length_is_bounded_too(serve: Serve, guard: Guard) -> None:
    def parts() -> Any:
        for _ in range(100):
            yield b" " * 100

    reply = httpx.post(serve(guard, max_body=2000).url + "/v1/score", content=parts())
    assert (reply.status_code, "more than 2000 bytes" in told(reply)) == (413, True)


def test_an_end_answers_what_was_taken_on(serve: Serve, slow: Slow, truth: Planted) -> None:
    served = serve(slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, served.url, "/v1/score", {"prompts": [truth.harmful.texts[60]]})
        assert slow.started.wait(10)
        served.server.should_exit = True
        threading.Timer(0.5, slow.go.set).start()
        assert first.result().status_code == 200
    served.thread.join(10)
    assert not served.thread.is_alive()


def test_logs_and_metrics_count_and_hold_no_text(
    serve: Serve, guard: Guard, truth: Planted, caplog: pytest.LogCaptureFixture
) -> None:
    url, text = serve(guard).url, truth.harmful.texts[60]
    with caplog.at_level(logging.INFO, "demur.serve"):
        reply = post(url, "/v1/score", {"prompts": [text, truth.harmless.texts[60]]})
        httpx.get(url + "/private/" + quote(text))
        metrics = httpx.get(url + "/metrics").text
    lines = [json.loads(record.message) for record in caplog.records if record.name == "demur.serve"]
    assert lines[0] | {"ms": 0} == {
        "id": reply.json()["id"], "method": "POST", "path": "/v1/score", "status": 200, "ms": 0, "prompts": 2,
        "flagged": 1,
    }  # fmt: skip
    assert lines[1]["path"] == "other"
    assert text not in caplog.text + metrics
    assert 'demur_requests_total{path="/v1/score",status="200"} 1.0' in metrics
    assert 'demur_prompts_total{flagged="true",verdict="refused"} 1.0' in metrics
    assert "demur_batch_prompts_sum 2.0" in metrics
    assert "demur_model_seconds_count 1.0" in metrics
    assert "demur_probe_seconds_count 1.0" in metrics


def test_a_failing_guard_is_answered_logged_without_text_and_tried_again(
    serve: Serve, slow: Slow, truth: Planted, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.go.set()
    url, text = serve(slow).url, truth.harmful.texts[60]

    def broken(*_: object) -> None:
        raise ZeroDivisionError(text)

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "demur.serve"):
        patch.setattr(slow, "score_residuals", broken)
        reply = post(url, "/v1/score", {"prompts": [text]})
        # A request is logged after its answer is sent, but before the next one is looked at.
        httpx.get(url + "/healthz")
    assert (reply.status_code, told(reply)) == (500, "the guard failed on this request")
    assert "ZeroDivisionError" in caplog.text
    assert text not in caplog.text
    noted = [json.loads(record.message) for record in caplog.records if record.name == "demur.serve"]
    assert [line["status"] for line in noted if line.get("path") == "/v1/score"] == [500]
    assert post(url, "/v1/score", {"prompts": [text]}).status_code == 200


def test_other_machines_need_a_key(guard: Guard) -> None:
    with pytest.raises(InputError, match=r"0\.0\.0\.0 can be reached from other machines; set a key"):
        run_server(guard, host="0.0.0.0")


def test_a_port_in_use_is_one_line(guard: Guard) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=r"is it in use\?"):
        run_server(guard, port=taken.getsockname()[1])


def test_the_command_serves_until_it_is_told_to_end(guard: Guard, truth: Planted, tmp_path: Path) -> None:
    truth.model.save_pretrained(tmp_path / "planted")
    truth.tokenizer.save_pretrained(tmp_path / "planted")
    guard.save(tmp_path / "guard")
    (tmp_path / "key").write_text("sk-file\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "demur", "guard", "serve", str(tmp_path / "guard"), "--model"]
    command += [str(tmp_path / "planted"), "--port", str(port), "--key-file", str(tmp_path / "key"), "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        deadline, url = time.monotonic() + 60, f"http://127.0.0.1:{port}"
        while time.monotonic() < deadline and server.poll() is None:
            try:
                httpx.get(url + "/healthz")
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        text = truth.harmful.texts[60]
        assert post(url, "/v1/score", {"prompts": [text]}).status_code == 401
        found = post(url, "/v1/score", {"prompts": [text]}, headers={"x-api-key": "sk-file"}).json()
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=30)
    assert found["results"][0]["flagged"]
    assert server.returncode == 0
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines if line["path"] == "/v1/score"] == [401, 200]
    assert "Traceback" not in said + text
    assert "stopped" not in said


@pytest.mark.skipif(which("chromium") is None, reason="chromium is not installed")
def test_the_page_shows_verdict_tokens_and_features(serve: Serve, guard: Guard, truth: Planted) -> None:
    text = truth.harmful.texts[60]
    url = serve(guard).url + "/#" + quote(text + " <b>x</b>")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=8000",
        "--dump-dom",
        url,
    ]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "Flagged. Harmful; the model refuses it" in page
    explained = guard.explain(text + " <b>x</b>")
    assert page.count('<span title="harm ') == len(explained.tokens)
    assert page.count("<td>harm</td>") == sum(each.role == "harm" for each in explained.features)
    assert "<b>x</b>" not in page
