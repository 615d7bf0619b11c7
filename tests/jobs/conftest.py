import pytest

from tests.tiny import write_world

SELECT = {"saes": "saes", "aligned": "aligned.jsonl", "unaligned": "unaligned.jsonl", "top_k": 4, "batch_size": 2}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A base model, two SAEs and texts in files, in the working directory."""
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
