import gzip
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from peft_sae.errors import ConfigError, DataError
from peft_sae.sae.identity import SaeIdentity
from peft_sae.selection import SelectedFeatures, Selection, fetch_labels, read_labels

EXPORT = [
    {"modelId": "m", "layer": "3-res", "index": "7", "description": " weapons "},
    {"modelId": "m", "layer": "3-res", "index": "7", "description": "a second opinion"},
    {"modelId": "m", "layer": "3-res", "index": 8, "description": ""},
    {"layer": "4", "index": "9", "description": "sea"},
]
PLAIN = {"12:4051": "politeness", "blocks.12.hook_resid_post:7": "ünï, 'x'"}


def _write(path, content):
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return path


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.json", json.dumps(PLAIN)),
        ("l.json", json.dumps([{"feature": name, "label": label, "by": "me"} for name, label in PLAIN.items()])),
        ("l.jsonl", "\n\n".join(json.dumps({"feature": n, "label": label}) for n, label in PLAIN.items())),
        ("l.v2.CSV", "feature,label\r\n12:4051,politeness\r\nblocks.12.hook_resid_post:7,\"ünï, 'x'\"\r\n"),
        ("l.csv", "\ufefffeature,note,label\n12:4051,,politeness\nblocks.12.hook_resid_post:7,,\"ünï, 'x'\"\n"),
    ],
)
def test_every_form_gives_the_same_labels(tmp_path, name, content):
    assert read_labels(_write(tmp_path / name, content)) == PLAIN
    assert read_labels(str(_write(tmp_path / f"{name}.gz", content))) == PLAIN


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.json", json.dumps(EXPORT)),
        ("batch-0.jsonl.gz", "\n".join(map(json.dumps, EXPORT))),
        ("e.csv", "modelId,layer,index,description\nm,3-res,7,weapons\nm,3-res,7,a second opinion\n,4,9,sea\n"),
    ],
)
def test_exports_of_neuronpedia_are_read(tmp_path, name, content):
    assert read_labels(_write(tmp_path / name, content)) == {"m/3-res:7": "weapons", "4:9": "sea"}


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("l.txt", "", ConfigError, r"suffix '.txt', so the form of the labels is unknown. Use one of .json"),
        ("l.json", "{", DataError, r"l.json' is not JSON"),
        ("l.json", "3", DataError, r"holds a int. Give an object or a list"),
        ("l.json", "[3]", DataError, r"Entry 1 of .* is '3' instead of a record"),
        ("l.json", '{"12:x": "a"}', DataError, r"Entry 1 of .* names the feature '12:x'. Write the hook point"),
        ("l.json", '{"1:2": 3}', DataError, r"gives '1:2' the label 3, which is no text"),
        ("l.jsonl", '{"feature": "1:2", "label": "a"}\n{"feature"', DataError, r"Line 2 of .* is not JSON"),
        ("l.jsonl", '{"feature": "1:2"}', DataError, r"Line 1 of .* gives '1:2' the label None"),
        ("l.csv", "name,label\n1:2,a\n", DataError, r"lacks the columns \['feature'\]. Begin the file"),
        ("l.csv", "feature,label\n1:2,a\n1:2,b\n", DataError, r"Line 3 of .* calls '1:2' 'b', which is 'a' before"),
        ("l.csv", "feature,label\n1:2\n", DataError, r"Line 2 of .* gives '1:2' the label None"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, content, error, message):
    with pytest.raises(error, match=message):
        read_labels(_write(tmp_path / name, content))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read .*No such file"):
        read_labels(tmp_path / "none.json")
    (tmp_path / "l.json.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "l.json.gz")
    (tmp_path / "l.csv").write_bytes(b"feature,label\n1:2,\xff\n")
    with pytest.raises(DataError, match=r"no text of the form \.csv in UTF-8"):
        read_labels(tmp_path / "l.csv")


def _selection(*features, neuronpedia_id="m/3-res"):
    sae = SaeIdentity("sae", "blocks.3.hook_resid_post", 32, 64, None, neuronpedia_id, "0" * 64)
    zeros = torch.zeros(len(features), dtype=torch.float64)
    return Selection((SelectedFeatures(sae, torch.tensor(features), *[zeros] * 6),), {})


@contextmanager
def _server(answers):
    """A local Neuronpedia.

    An answer is a text, a list of parts with None for a pause, a status alone, None for silence, or a function.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer = answers[self.path.rsplit("/", 1)[-1]]
            if callable(answer):
                answer = answer()
            if answer is None:  # no answer at all
                return
            status, body = (answer, b"") if isinstance(answer, int) else (200, answer)
            body = body.encode() if isinstance(body, str) else body
            self.send_response(status)
            self.end_headers()
            for part in body if isinstance(body, list) else [body]:
                if part is None:
                    time.sleep(0.1)
                else:
                    self.wfile.write(part)
                    self.wfile.flush()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # who asked may be gone
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(*descriptions):
    return json.dumps({"index": "7", "explanations": [{"description": text} for text in descriptions]})


def test_labels_are_fetched(caplog):
    with _server({"7": _answer("weapons", "arms"), "8": _answer(), "9": _answer(None, " sea ")}) as (url, asked):
        labels = fetch_labels(_selection(7, 8, 9), server=url)

    assert labels == {"blocks.3.hook_resid_post:7": "weapons", "blocks.3.hook_resid_post:9": "sea"}
    assert sorted(asked) == [f"/api/feature/m/3-res/{feature}" for feature in (7, 8, 9)]
    assert caplog.text == ""


@pytest.mark.parametrize(
    "bad", [404, 500, 429, "<html>", "[]", '{"explanations": 3}', '{"explanations": [3]}', '{"explanations"']
)
def test_a_bad_answer_costs_its_own_label_only(caplog, bad):
    entered = threading.Event()

    def good():
        entered.set()
        return _answer("weapons")

    def wrong():
        assert entered.wait(5)
        return bad

    with _server({"7": good, "8": wrong}) as (url, _):
        labels = fetch_labels(_selection(7, 8), server=url)

    assert labels == {"blocks.3.hook_resid_post:7": "weapons"}
    assert ("1 of 2 features got no answer" in caplog.text) == (bad != '{"explanations": [3]}')


def test_a_server_that_hangs_costs_no_more_than_the_time_given(caplog):
    release = threading.Event()
    with _server({"7": _answer("weapons"), "8": lambda: release.wait(10) and 500}) as (url, _):
        start = time.monotonic()
        labels = fetch_labels(_selection(7, 8), timeout=1.0, server=url)
        took = time.monotonic() - start
        release.set()

    assert took < 3
    assert labels == {"blocks.3.hook_resid_post:7": "weapons"}
    assert "1 of 2 features got no answer" in caplog.text


def test_a_server_that_trickles_costs_no_more_either():
    with _server({"7": [b" ", None] * 40}) as (url, _):
        start = time.monotonic()
        assert fetch_labels(_selection(7), timeout=0.4, server=url) == {}
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("refusal", [429, None])
def test_a_server_that_wants_no_more_requests_gets_none(caplog, refusal):
    with _server({str(feature): refusal for feature in range(40)}) as (url, asked):
        assert fetch_labels(_selection(*range(40)), server=url) == {}
    assert 1 <= len(asked) <= 8  # those under way at the time
    assert "40 of 40 features got no answer" in caplog.text


def test_nobody_there(caplog):
    with _server({}) as (url, _):
        pass
    start = time.monotonic()
    assert fetch_labels(_selection(*range(40)), server=url) == {}
    assert time.monotonic() - start < 2
    assert "40 of 40 features got no answer" in caplog.text
    assert "refused" in caplog.text


def test_saes_without_a_dashboard_are_not_asked_for(caplog):
    assert fetch_labels(_selection(7, neuronpedia_id=None), server="http://127.0.0.1:9") == {}
    assert "None of the SAEs has a Neuronpedia id" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"timeout": 0}, "timeout=0 leaves no time"), ({"server": "file:///etc"}, "is no address")],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ConfigError, match=message):
        fetch_labels(_selection(7), **arguments)
