import pytest
import torch
from tokenizers import processors

from peft_sae import SaeSubspaceConfig
from peft_sae.errors import ArtifactError, ConfigError, DataError
from peft_sae.training import train_adapter
from peft_sae.training.examples import encode_examples
from tests.tiny import ALIGNED, make_model, make_subspace, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing[a-z_]*` is deprecated:FutureWarning")


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

    assert feature == {"input_ids": [1, 4, 5, 6], "labels": [-100, 4, 5, 6]}


@pytest.mark.parametrize("length", [5, 6])
def test_a_text_of_just_the_length_is_learned_whole(length, caplog):
    (feature,) = encode_examples(make_tokenizer(), ["red green blue sun"], length)

    assert feature["labels"] == [-100, 4, 5, 6, 7, 2][:length]  # EOS where there is room
    messages = [{"role": "user", "content": "sea"}, {"role": "assistant", "content": "sun moon"}]
    (chat,) = encode_examples(make_tokenizer(), [{"messages": messages}], 6)
    assert chat["labels"][-2:] == [7, 8]
    assert not caplog.text


def test_examples_whose_prompts_are_too_long_are_left_out(caplog):
    long = {"prompt": "red green blue red green blue", "completion": " sun"}
    cut = {"prompt": "red green blue", "completion": " sun sun sun sun"}

    features = encode_examples(make_tokenizer(), [long, ALIGNED[1], cut, long], 6)

    ids = make_tokenizer()("red green blue sun sun")["input_ids"]  # with BOS, and without EOS
    assert [feature["input_ids"] for feature in features] == [[1, 9, 7, 7, 8, 2], ids]
    assert "2 of 4 training examples are left out: their prompts alone fill 6 tokens" in caplog.text
    assert "1 of 4 training texts were cut at 6 tokens" in caplog.text
    with pytest.raises(DataError, match=r"None of the 2 training examples .* within 6 tokens.*Raise max_length"):
        encode_examples(make_tokenizer(), [long, long], 6)
    with pytest.raises(DataError, match="example 1 has no response, so nothing is learned from it"):
        encode_examples(make_tokenizer(), [ALIGNED[1], {"prompt": "red", "completion": ""}], 7)


def test_training_lowers_the_loss_on_completions_only(tmp_path, capfd):
    tokenizer, model = make_tokenizer(), make_model()
    features = encode_examples(tokenizer, ALIGNED, 64)
    assert features[1] == {"input_ids": [1, 9, 7, 7, 8, 2], "labels": [-100, -100, 7, 7, 8, 2]}
    batch = {name: torch.tensor([features[0][name]]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        before = model(**batch).loss

    config = SaeSubspaceConfig(subspace=make_subspace(model), r="auto", target_modules="all-linear")
    adapted = train_adapter(
        model,
        tokenizer,
        ALIGNED,
        config,
        tmp_path / "out",
        progress=False,
        max_steps=20,
        learning_rate=0.02,
        logging_steps=5,
    )
    assert "loss" not in "".join(capfd.readouterr())

    with torch.no_grad():
        assert adapted(**batch).loss < 0.7 * before
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_wrong_training_arguments_are_told(tmp_path):
    model = make_model()
    config = SaeSubspaceConfig(subspace=make_subspace(model), r=2, target_modules=["q_proj"])

    with pytest.raises(ConfigError, match=r"no argument 'learning_rat'.* Did you mean 'learning_rate'"):
        train_adapter(model, make_tokenizer(), ALIGNED, config, tmp_path / "out", learning_rat=1)
    with pytest.raises(DataError, match="training data are empty"):
        train_adapter(model, make_tokenizer(), [], config, tmp_path / "out")
    with pytest.raises(DataError, match="has a response within 2 tokens"):
        train_adapter(model, make_tokenizer(), ALIGNED, config, tmp_path / "out", max_length=2)
    assert not any("lora_" in name for name, _ in model.named_parameters())


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
