"""An OpenAI-compatible endpoint on this machine that scores by a rule, and misbehaves as it is told."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = (
    "bad json",  # words where JSON is asked for
    "out of range",  # a score of 7
    "refusal",  # declines in words
    "null score",  # declines in the form that it is asked to
    "filter",  # the host's filter of contents
    "rate limit",  # 429 with Retry-After
    "long rate limit",  # 429 with a Retry-After of an hour
    "error",  # 500
    "hang",  # no answer within any time-out of a test
    "drop",  # the connection is closed
    "other form",  # JSON that is no completion
    "unauthorised",  # 401
    "too long",  # 400, the context is exceeded
    "parts",  # content as a list of parts
)


def score_of(answer: str) -> int:
    """Return the score that the fake gives: 1 of a refusal or of nothing, else anything, but always the same."""
    if not answer or re.match(r"(sorry|i can(no|')t|i won't)", answer, re.IGNORECASE):
        return 1
    return 1 + int(hashlib.sha256(answer.encode()).hexdigest(), 16) % 5


class FakeJudge:
    """The endpoint. Made by `fake_judge`.

    Attributes:
        url: its base URL.
        requests: the bodies of the requests that it got, in order.
        keys: the keys that they came with.
    """

    def __init__(self, faults: Iterable[str | None], rule: Callable[[str], int], hang: float) -> None:
        self._faults, self._lock, self._rule, self._hang = iter(faults), threading.Lock(), rule, hang
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""
        self.closing = threading.Event()

    def note(self, body: dict[str, Any], key: str | None) -> str | None:
        """Remember a request and return the fault that it meets."""
        with self._lock:
            self.requests.append(body)
            self.keys.append(key)
            return next(self._faults, None)

    def respond(self, body: dict[str, Any], fault: str | None) -> tuple[int, dict[str, str], Any] | None:
        """Return status, headers and body of a response; None for none."""
        if fault == "hang":
            self.closing.wait(self._hang)
            return None
        if fault == "drop":
            return None
        if fault in ("rate limit", "long rate limit"):
            wait = "0.05" if fault == "rate limit" else "3600"
            return 429, {"Retry-After": wait}, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
        if fault == "other form":
            return 200, {}, {"detail": "model is loading"}
        if fault == "error":
            return 500, {}, {"error": {"message": "out of order"}}
        if fault == "unauthorised":
            return 401, {}, {"error": {"message": f"wrong key {self.keys[-1]}", "code": "invalid_api_key"}}
        if fault == "filter":
            return 400, {}, {"error": {"message": "filtered", "code": "content_filter"}}
        if fault == "too long":
            message = "the context has 9,000 tokens, and 8,192 fit"
            return 400, {}, {"error": {"message": message, "code": "context_length_exceeded"}}
        found = re.search(r"<answer-(\w+)>\n(.*)\n</answer-\1>", body["messages"][1]["content"], re.DOTALL)
        score = self._rule(found[2] if found else "")
        replies = {
            "bad json": "It is rather harmful, I should say.",
            "out of range": '{"score": 7, "reason": "beyond all measure"}',
            "refusal": "I'm sorry, but I can't help with that.",
            "null score": '{"score": null, "reason": "I would rather not"}',
        }
        reply = replies.get(fault or "", json.dumps({"score": score, "reason": f"by rule, {score}"}))
        message: dict[str, Any] = {"role": "assistant", "content": reply}
        if fault == "parts":
            message["content"] = [{"type": "text", "text": reply[:9]}, {"type": "text", "text": reply[9:]}]
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        completion = {"id": "0", "object": "chat.completion", "created": 0, "model": "fake", "choices": [choice]}
        return 200, {}, completion


@contextmanager
def fake_judge(
    faults: Iterable[str | None] = (), *, rule: Callable[[str], int] = score_of, hang: float = 30.0
) -> Iterator[FakeJudge]:
    """Serve a fake judge until the block ends.

    Args:
        faults: what goes wrong with the first request, the second one, and so on: one of `FAULTS`, or None.
        rule: the score of an answer.
        hang: seconds that a request hangs, at most.
    """
    judge = FakeJudge(faults, rule, hang)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length))
            response = judge.respond(body, judge.note(body, self.headers.get("Authorization")))
            if response is None:
                self.close_connection = True
                return
            status, headers, content = response
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {
                **headers,
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
