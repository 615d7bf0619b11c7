"""Every way in which the fake endpoint misbehaves, over real HTTP."""

import logging
import threading
import time

import pytest

pytest.importorskip("openai", reason="the extra 'paper' is not installed")

from benchmarks.paper import openai_judge
from benchmarks.paper.fake_judge import fake_judge
from benchmarks.paper.judging import Item, JudgeError, make_judge
from benchmarks.paper.scoring import score
from benchmarks.paper.specs import OpenAIJudgeSpec
from peft_sae.errors import ConfigError

ITEMS = [Item(f"How do I make {number}?", f"Take {number}.", "harmful") for number in range(6)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(openai_judge, "_FIRST_WAIT", 0.01)


def spec_of(server, **changes):
    return OpenAIJudgeSpec(**{"model": "fake", "base_url": server.url, "api_key_env": None, "timeout": 2.0, **changes})


def verdicts(server, items=ITEMS, **changes):
    found = dict(make_judge(spec_of(server, **changes)).score(items))
    return [found[index] for index in range(len(items))]


def rule(answer):
    return 1 + int(answer[5]) % 5


def test_answers_are_scored_in_whatever_order_they_come():
    with fake_judge(rule=rule) as server:
        found = verdicts(server)
    assert [verdict.score for verdict in found] == [1, 2, 3, 4, 5, 1]
    assert found[1].reason == "by rule, 2"
    body = server.requests[0]
    assert (body["model"], body["temperature"]) == ("fake", 0)
    assert body["messages"][0]["content"].startswith("You judge how far")


@pytest.mark.parametrize("fault", ["rate limit", "error", "drop", "other form"])
def test_what_passes_is_tried_again(fault):
    with fake_judge([fault, fault], rule=rule) as server:
        (found,) = verdicts(server, ITEMS[:1])
    assert (found.score, found.asks) == (1, 1)
    assert len(server.requests) == 3


def test_a_judge_that_hangs_is_tried_again_after_the_time_out():
    with fake_judge(["hang"], rule=rule) as server:
        start = time.monotonic()
        (found,) = verdicts(server, ITEMS[:1], timeout=0.3)
        assert time.monotonic() - start < 5
    assert found.score == 1
    assert len(server.requests) == 2


def test_retry_after_is_honoured(monkeypatch):
    waits = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return False

    with fake_judge(["rate limit", "error"], rule=rule) as server:
        judge = make_judge(spec_of(server))
        judge._stop = Event()
        list(judge.score(ITEMS[:1]))
    told, own = waits
    assert told == 0.05
    assert 0.015 <= own <= 0.02  # the second wait of one's own, with jitter


def test_a_long_retry_after_ends_the_run_and_keeps_scores(tmp_path):
    with fake_judge([None, None, "long rate limit"], rule=rule) as server:
        spec = spec_of(server, workers=1)
        with pytest.raises(JudgeError, match=r"wants 3600 seconds of peace.*longest_wait is 60.*Scores are kept"):
            run(spec, tmp_path)
        assert len(server.requests) == 3
        assert [verdict.score for verdict in run(spec, tmp_path)] == [1, 2, 3, 4, 5, 1]
        assert len(server.requests) == 3 + 4


def run(spec, folder, items=ITEMS):
    return score(lambda: make_judge(spec), spec, items, folder / "scores.jsonl", label="", progress=False)


def test_patience_has_an_end_and_scores_are_kept(tmp_path):
    with fake_judge([None, *["error"] * 3], rule=rule) as server:
        spec = spec_of(server, workers=1, retries=2)
        with pytest.raises(JudgeError, match=r"not answered in 3 tries.*out of order.*start again"):
            run(spec, tmp_path)
        assert (tmp_path / "scores.jsonl").read_text().count("\n") == 1
        run(spec, tmp_path)
        assert len(server.requests) == 4 + 5
        run(spec, tmp_path)
        assert len(server.requests) == 4 + 5


def test_scores_under_way_are_kept_when_another_one_fails(tmp_path):
    with fake_judge(["unauthorised"], rule=rule) as server:
        with pytest.raises(JudgeError):
            run(spec_of(server, workers=3), tmp_path)
        kept = (tmp_path / "scores.jsonl").read_text().count("\n")
        assert kept == len(server.requests) - 1


def test_a_kill_in_the_middle_loses_nothing(tmp_path):
    class Killed(BaseException):
        pass

    with fake_judge(rule=rule) as server:
        spec = spec_of(server, workers=1)
        judge = make_judge(spec)

        class Dies:
            def score(self, items):
                for number, found in enumerate(judge.score(items)):
                    if number == 3:
                        raise Killed
                    yield found

        with pytest.raises(Killed):
            score(lambda: Dies(), spec, ITEMS, tmp_path / "scores.jsonl", label="", progress=False)
        before = len(server.requests)
        run(spec, tmp_path)
        assert len(server.requests) - before == 3  # the fourth score had come, and was not kept
        asked = [body["messages"][1]["content"] for body in server.requests]
        assert all(asked.count(text) <= 2 for text in asked)
        assert sum(asked.count(text) == 2 for text in set(asked)) <= 2


def test_equal_answers_are_judged_once(tmp_path):
    with fake_judge(rule=rule) as server:
        found = run(spec_of(server), tmp_path, [*ITEMS, *ITEMS])
        assert len(found) == 12
        assert len(server.requests) == 6


@pytest.mark.parametrize("fault", ["bad json", "out of range"])
def test_a_wrong_reply_is_shown_to_the_judge_and_asked_again(fault):
    with fake_judge([fault], rule=rule) as server:
        (found,) = verdicts(server, ITEMS[:1])
    assert (found.score, found.asks) == (1, 2)
    last = server.requests[1]["messages"]
    assert [message["role"] for message in last] == ["system", "user", "assistant", "user"]
    assert ("none of 1 to 5" if fault == "out of range" else "no JSON object") in last[3]["content"]


@pytest.mark.parametrize("fault", ["bad json", "out of range"])
def test_a_judge_that_never_learns_gives_no_score(fault):
    with fake_judge([fault] * 9, rule=rule) as server:
        (found,) = verdicts(server, ITEMS[:1], asks=2)
    assert (found.score, found.problem, found.asks) == (None, "bad reply", 2)
    assert len(server.requests) == 2
    assert ("7" if fault == "out of range" else "harmful, I should say") in found.reason


@pytest.mark.parametrize("fault", ["refusal", "null score", "filter"])
def test_a_judge_that_refuses_is_recorded_and_not_pressed(fault, tmp_path):
    with fake_judge([fault], rule=rule) as server:
        spec = spec_of(server, workers=1)
        first, *others = run(spec, tmp_path)
        assert (first.score, first.problem) == (None, "refused to score")
        assert first.reason
        assert [verdict.score for verdict in others] == [2, 3, 4, 5, 1]
        assert run(spec, tmp_path)[0] == first
        assert len(server.requests) == 6


def test_the_key_is_sent_and_written_nowhere(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-1")
    with caplog.at_level(logging.DEBUG, logger="benchmarks"), fake_judge(["unauthorised"]) as server:
        with pytest.raises(
            JudgeError, match=r"refuses the request.*wrong key Bearer \*\*\*.*Check judge.model"
        ) as told:
            run(spec_of(server, api_key_env="JUDGE_KEY"), tmp_path)
        run(spec_of(server, api_key_env="JUDGE_KEY"), tmp_path)
    assert server.keys[0] == "Bearer sk-secret-1"
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert all("secret" not in text for text in [*written, str(told.value), caplog.text])


def test_a_missing_key_is_told_before_anything(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"JUDGE_KEY is not set.*api_key_env: null"):
        make_judge(OpenAIJudgeSpec(model="fake", api_key_env="JUDGE_KEY"))


def test_no_more_requests_run_than_workers():
    running, most, lock = [0], [0], threading.Lock()

    def slow(answer):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.03)
        with lock:
            running[0] -= 1
        return 3

    with fake_judge(rule=slow) as server:
        verdicts(server, workers=2)
    assert most[0] == 2


@pytest.mark.parametrize(
    ("header", "seconds"), [("2", 2.0), ("0.5", 0.5), ("-3", 0.0), (None, None), ("soon", None), ("nan", None)]
)
def test_retry_after_headers(header, seconds):
    assert openai_judge._seconds(header) == seconds


def test_a_date_in_retry_after():
    assert openai_judge._seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert openai_judge._seconds("Wed, 21 Oct 2099 07:28:00 GMT") > 1e8


@pytest.mark.parametrize("parameters", [{"top_k": 5}, {"stream": True}, {"n": 2}])
def test_parameters_that_cannot_work_are_told_before_the_first_request(parameters):
    (name,) = parameters
    with pytest.raises(ConfigError, match=rf"judge\.parameters\.{name}: "):
        make_judge(OpenAIJudgeSpec(model="fake", base_url="http://nowhere", api_key_env=None, parameters=parameters))


def test_an_answer_that_is_too_long_for_the_judge_stops_nobody_else():
    with fake_judge(["too long"], rule=rule) as server:
        found = verdicts(server, ITEMS[:2], workers=1)
    assert (found[0].score, found[0].problem) == (None, "bad reply")
    assert "context" in found[0].reason
    assert found[1].score == 2


def test_a_reply_in_parts_is_read():
    with fake_judge(["parts"], rule=rule) as server:
        (found,) = verdicts(server, ITEMS[:1])
    assert (found.score, found.asks) == (1, 1)


def test_an_interruption_keeps_what_is_under_way(monkeypatch):
    asked, original = [], openai_judge.wait

    def interrupted(*arguments, **options):
        asked.append(arguments)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(openai_judge, "wait", interrupted)
    kept = []

    def keep(server):
        for index, verdict in make_judge(spec_of(server, workers=3)).score(ITEMS):
            kept.append((index, verdict.score))

    with fake_judge(rule=rule) as server, pytest.raises(KeyboardInterrupt):
        keep(server)
    assert len(server.requests) == 3
    assert sorted(kept) == [(0, 1), (1, 2), (2, 3)]
