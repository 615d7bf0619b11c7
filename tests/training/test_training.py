import pytest
import torch
import yaml
from tokenizers import processors

from peft_sae import SaeSubspaceConfig
from peft_sae.errors import ArtifactError, ConfigError, DataError
from peft_sae.training import read_job, train_adapter
from peft_sae.training.train import Collator, encode_examples
from tests.tiny import ALIGNED, make_model, make_subspace, make_tokenizer

JOB = {"model": "base", "data": "aligned.jsonl", "subspace": "subspace", "output": "adapter", "adapter": {"r": 4}}


def test_the_end_is_learned_once_and_left_to_the_chat_template():
    adding, chat = make_tokenizer(), make_tokenizer()
    adding._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    messages = [{"role": "user", "content": "sea"}, {"role": "assistant", "content": "sun moon"}]

    (plain,) = encode_examples(adding, ALIGNED[1:], 64)
    (turns,) = encode_examples(chat, [{"messages": messages}], 64)

    assert plain == {"input_ids": [1, 9, 7, 7, 8, 2], "labels": [-100, -100, 7, 7, 8, 2]}
    assert turns == {"input_ids": [1, 16, 9, 17, 7, 8], "labels": [-100, -100, -100, -100, 7, 8]}


def test_a_text_that_was_cut_does_not_teach_to_stop():
    (feature,) = encode_examples(make_tokenizer(), ["red green blue sun"], 4)

    assert feature == {"input_ids": [1, 4, 5], "labels": [-100, 4, 5]}


def test_training_lowers_the_loss_on_completions_only(tmp_path):

    tokenizer, model = make_tokenizer(), make_model()
    features = encode_examples(tokenizer, ALIGNED, 64)
    assert features[1] == {"input_ids": [1, 9, 7, 7, 8, 2], "labels": [-100, -100, 7, 7, 8, 2]}
    batch = Collator(0)(features)
    assert batch["attention_mask"].sum(dim=1).tolist() == [8, 6]
    assert batch["labels"][1].tolist() == [-100, -100, 7, 7, 8, 2, -100, -100]
    with torch.no_grad():
        before = model(**batch).loss

    config = SaeSubspaceConfig(subspace=make_subspace(model), r="auto", target_modules="all-linear")
    adapted = train_adapter(
        model, tokenizer, ALIGNED, config, tmp_path / "out", progress=False, max_steps=20, learning_rate=0.02
    )

    with torch.no_grad():
        assert adapted(**batch).loss < 0.7 * before
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptor": {}}, "unknown key 'adaptor'.* Did you mean 'adapter'"),
        ({"model": None}, r"lacks the keys \['model'\]"),
        ({"adapter": []}, r"Key 'adapter' .* is \[\], and a mapping is needed"),
        ({"adapter": {"rank": 3}}, "no field 'rank'"),
        ({"adapter": {"subspace": "x"}}, "Put it at the top"),
    ],
)
def test_a_job_is_checked_before_anything_is_loaded(tmp_path, change, message):

    job = {**JOB, **change}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))

    with pytest.raises(ConfigError, match=message):
        read_job(tmp_path / "job.yaml")


def test_wrong_training_arguments_are_told(tmp_path):

    model = make_model()
    config = SaeSubspaceConfig(subspace=make_subspace(model), r=2, target_modules=["q_proj"])

    with pytest.raises(ConfigError, match=r"no argument 'learning_rat'.* Did you mean 'learning_rate'"):
        train_adapter(model, make_tokenizer(), ALIGNED, config, tmp_path / "out", learning_rat=1)
    with pytest.raises(DataError, match="training data are empty"):
        train_adapter(model, make_tokenizer(), [], config, tmp_path / "out")
    with pytest.raises(DataError, match="no response within 3 tokens"):
        train_adapter(model, make_tokenizer(), ALIGNED, config, tmp_path / "out", max_length=3)
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_numbers_as_people_write_them(tmp_path):
    (tmp_path / "job.yaml").write_text(
        "{model: a, data: b, subspace: c, output: d, training: {learning_rate: 2e-4, optim: adamw_torch}}"
    )

    assert read_job(tmp_path / "job.yaml").training == {"learning_rate": 2e-4, "optim": "adamw_torch"}


def test_an_output_that_exists_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    model = make_model()

    with pytest.raises(ArtifactError, match="writing there would destroy it"):
        train_adapter(model, make_tokenizer(), ALIGNED, None, tmp_path)


def test_every_turn_of_the_assistant_is_learned():
    turns = [("user", "red"), ("assistant", "sun"), ("user", "sea"), ("assistant", "moon moon")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (feature,) = encode_examples(make_tokenizer(), [{"messages": messages}], 64)
    learned = [token for token, label in zip(feature["input_ids"], feature["labels"], strict=True) if label == token]
    assert learned == [7, 8, 8]
