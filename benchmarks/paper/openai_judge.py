"""A judge behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import logging
import math
import os
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from benchmarks.paper.judging import RUBRICS, Item, JudgeError, Verdict, parse_reply, question
from benchmarks.paper.specs import OpenAIJudgeSpec
from peft_sae.errors import ConfigError, suggest

logger = logging.getLogger(__name__)

_FIRST_WAIT = 1.0  # seconds
_PASSING = (408, 409, 425, 429)


def check_parameters(spec: OpenAIJudgeSpec) -> None:
    """Check the request's parameters before anything is loaded.

    Raises:
        ConfigError: the client knows no such parameter, or replies would have another form.
    """
    import inspect

    from openai.resources.chat import Completions

    known = set(inspect.signature(Completions.create).parameters) - {"self", "model", "messages"}
    for name in spec.parameters:
        if name not in known:
            raise ConfigError(
                f"judge.parameters.{name}: OpenAI's client has no such parameter.{suggest(name, known)} What only your "
                "server knows goes into extra_body: {...}."
            )
        if name in ("stream", "n"):
            raise ConfigError(f"judge.parameters.{name}: one whole reply is needed. Leave it out.")


class _Unscorable(Exception):
    """One answer cannot be sent, and others can."""


class OpenAIJudge:
    """Asks a model over HTTP, several requests at a time.

    Rate limits, time-outs, lost connections and the server's errors are met with patience: waits double from a second
    on, or are what `Retry-After` says. A reply that is not what was asked for is shown to the judge with what is wrong
    with it, a few times. The key is never written anywhere.

    Args:
        spec: endpoint, model and patience.

    Raises:
        ConfigError: the environment has no key, or a parameter is none of the client's.
    """

    def __init__(self, spec: OpenAIJudgeSpec) -> None:
        import openai

        check_parameters(spec)
        key = None if spec.api_key_env is None else os.environ.get(spec.api_key_env)
        if spec.api_key_env is not None and not key:
            raise ConfigError(
                f"The environment variable {spec.api_key_env} is not set, so the judge '{spec.model}' cannot be asked. "
                "Set it, or give judge.api_key_env: null for an endpoint that wants no key."
            )
        self._spec, self._key, self._stop = spec, key, threading.Event()
        self._client = openai.OpenAI(api_key=key or "none", base_url=spec.base_url, timeout=spec.timeout, max_retries=0)

    def score(self, items: Sequence[Item]) -> Iterator[tuple[int, Verdict]]:
        """Yield each item's index and verdict, as they come; those under way are waited for before an error is raised.

        Raises:
            JudgeError: the endpoint refuses, or does not answer in spite of all patience.
        """
        self._stop.clear()
        waiting = iter(enumerate(items))
        failure: BaseException | None = None
        with ThreadPoolExecutor(self._spec.workers) as pool:
            try:
                running: dict[Future[Verdict], int] = {}
                while True:
                    while failure is None and len(running) < self._spec.workers:
                        index, item = next(waiting, (None, None))
                        if index is None or item is None:
                            break
                        running[pool.submit(self._judge, item)] = index
                    if not running:
                        break
                    try:
                        done = wait(running, return_when=FIRST_COMPLETED).done
                    except KeyboardInterrupt as interrupt:  # what is under way is paid for
                        failure, done = failure or interrupt, set()
                        self._stop.set()
                    for future in done:
                        index = running.pop(future)
                        if future.exception() is None:
                            yield index, future.result()
                        else:
                            failure = failure or future.exception()
                            self._stop.set()  # nobody is to wait for a next try in vain
            finally:
                self._stop.set()  # whoever waits for a next try, when the consumer has had enough
        if failure is not None:
            raise failure

    def _judge(self, item: Item) -> Verdict:
        messages = [{"role": "system", "content": RUBRICS[item.kind]}, {"role": "user", "content": question(item)}]
        wrong = ""
        for ask in range(1, self._spec.asks + 1):
            try:
                reply, refused = self._ask(messages)
            except _Unscorable as error:
                return Verdict(None, str(error), "bad reply", ask)
            if refused:
                return Verdict(None, reply[:500], "refused to score", ask)
            found = parse_reply(reply)
            if isinstance(found, Verdict):
                return Verdict(found.score, found.reason, found.problem, ask)
            wrong = found
            messages = [
                *messages[:2],
                {"role": "assistant", "content": reply},
                {"role": "user", "content": f"Your reply has {wrong}. Reply with the JSON object only."},
            ]
        return Verdict(None, wrong, "bad reply", self._spec.asks)

    def _ask(self, messages: Any) -> tuple[str, bool]:
        """Return the reply, and whether the model or a filter of its host declines to give one."""
        import openai

        tries = self._spec.retries + 1
        for attempt in range(tries):
            try:
                found = self._client.chat.completions.create(
                    model=self._spec.model, messages=messages, **self._spec.parameters
                )
                return _read(found)
            except openai.APIStatusError as error:
                if error.code == "content_filter":
                    return self._clean(error), True
                if error.code == "context_length_exceeded":
                    raise _Unscorable(self._clean(error)) from None
                if error.code == "insufficient_quota" or not (
                    error.status_code in _PASSING or error.status_code >= 500
                ):
                    raise JudgeError(
                        f"The judge '{self._spec.model}' refuses the request ({self._clean(error)}), and would refuse "
                        "the next ones, too. Check judge.model, judge.parameters, the key and the quota."
                    ) from None
                problem, asked = self._clean(error), error.response.headers.get("retry-after")
            except openai.APIConnectionError as error:  # time-outs are of this kind
                problem, asked = f"{type(error).__name__}: {self._clean(error)}", None
            except (ValueError, openai.APIResponseValidationError) as error:
                problem, asked = f"no reply in the form of the API: {self._clean(error)}", None
            if attempt + 1 < tries:
                self._wait(attempt, asked, problem)
        raise JudgeError(
            f"The judge '{self._spec.model}' has not answered in {tries} tries, the last one ended with {problem}. "
            "Scores are kept: start again when it answers, with fewer judge.workers or more judge.retries."
        )

    def _wait(self, attempt: int, asked: str | None, problem: str) -> None:
        seconds = min(_FIRST_WAIT * 2**attempt, self._spec.longest_wait) * random.uniform(0.75, 1.0)
        told = _seconds(asked)
        if told is not None:
            if told > self._spec.longest_wait:
                raise JudgeError(
                    f"The judge '{self._spec.model}' wants {told:.0f} seconds of peace ({problem}), and "
                    f"judge.longest_wait is {self._spec.longest_wait:.0f}. Scores are kept: start again later."
                )
            seconds = told
        logger.warning("The judge is asked again in %.1f seconds (%s).", seconds, problem)
        if self._stop.wait(seconds):
            raise JudgeError("The judge is not asked any further. Scores are kept: start again.")

    def _clean(self, error: Exception) -> str:
        text = str(error)[:500]
        return text.replace(self._key, "***") if self._key else text


def _read(found: Any) -> tuple[str, bool]:
    """The text of a completion, of which some servers leave parts out."""
    choices = getattr(found, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        raise ValueError("there is no choice with a message")
    message = choices[0].message
    refusal = getattr(message, "refusal", None)
    if refusal:
        return str(refusal), True
    if choices[0].finish_reason == "content_filter":
        return "its host has filtered the reply", True
    content: Any = message.content
    if isinstance(content, list):  # parts, of which some servers make a text
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else "", False


def _seconds(header: str | None) -> float | None:
    """Seconds of a `Retry-After` header, which may also be a date; None of one that cannot be read."""
    from email.utils import parsedate_to_datetime
    from time import time

    if header is None:
        return None
    try:
        found = float(header)
    except ValueError:
        try:
            found = parsedate_to_datetime(header).timestamp() - time()
        except ValueError:
            return None
    return max(found, 0.0) if math.isfinite(found) else None
