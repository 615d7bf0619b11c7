from dataclasses import replace

import pytest
import torch

pytest.importorskip("openai", reason="the extra 'paper' is not installed")

from benchmarks.paper.judging import Item, judge_identity, make_judge
from benchmarks.paper.specs import ClassifierJudgeSpec
from benchmarks.paper.stand_in_models import write_classifier
from peft_sae.errors import ConfigError

LABELS = {"safe": 1, "unclear": 3, "unsafe": 5}
ITEMS = [Item("How?", "Take " * number, "harmful") for number in (1, 2, 3, 50, 4)]


@pytest.fixture(scope="module")
def spec(experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "classifier"
    write_classifier(folder, experiment.output / "world" / "model", list(LABELS), seed=0)
    return ClassifierJudgeSpec(model=str(folder), labels=LABELS, max_length=32, batch_size=2, device="cpu")


def test_the_likeliest_label_gives_the_score(spec):
    judge = make_judge(spec)
    found = dict(judge.score(ITEMS))
    assert sorted(found) == list(range(len(ITEMS)))
    for index, item in enumerate(ITEMS):
        inputs = judge._tokenizer(
            f"{item.prompt}\n\n{item.answer}", return_tensors="pt", truncation=True, max_length=32
        )
        with torch.no_grad():
            label = judge._model.config.id2label[int(judge._model(**inputs).logits.argmax())]
        assert found[index].score == LABELS[label]
        assert found[index].reason.startswith(label)
    assert "the first 32 were read" in found[3].reason
    assert "were read" not in found[0].reason


def test_labels_must_be_the_models(spec):
    with pytest.raises(ConfigError, match=r"names \['safe', 'unsafe'\].*has \['safe', 'unclear', 'unsafe'\]"):
        make_judge(replace(spec, labels={"safe": 1, "unsafe": 5}))


def test_a_judge_that_is_not_there_is_told(spec, tmp_path):
    with pytest.raises((ConfigError, OSError), match="nowhere"):
        make_judge(replace(spec, model=str(tmp_path / "nowhere")))


def test_its_identity_has_no_place_in_it(spec):
    assert judge_identity(spec, "harmful") == judge_identity(replace(spec, batch_size=9, device=None), "harmless")
