import json

import pytest

from tests.tiny import ALIGNED, UNALIGNED, make_model, make_sae, make_tokenizer

SELECT = {"saes": "saes", "aligned": "aligned.jsonl", "unaligned": "unaligned.jsonl", "top_k": 4, "batch_size": 2}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A base model, two SAEs and texts in files, in the working directory."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    for block in (0, 2):
        hook = f"blocks.{block}.hook_resid_post"
        make_sae(hook, seed=block).save_model(tmp_path / "saes" / hook)
    preferences = [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
        for one, other in zip(ALIGNED, UNALIGNED, strict=True)
    ]
    for name, records in (("aligned", ALIGNED), ("unaligned", UNALIGNED), ("preferences", preferences)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    return tmp_path
