"""The demo's world on disk: ordinary files that ordinary loaders read, and nothing half-written."""

import json
import shutil

import pytest
import torch

from peft_sae.demo import model as demo_model
from peft_sae.demo.language import prompt
from peft_sae.demo.size import ModelSize, SaeSize, WorldSize
from peft_sae.demo.world import build_world, load_world
from peft_sae.errors import ArtifactError

TINY = WorldSize(
    topics=12,
    fine_tuning_topics=4,
    model=ModelSize(layers=2, hidden=32, heads=2, steps=8, batch=8),
    saes=SaeSize(layers=(0, 1), width=64, active=4, steps=8, batch=64, texts=64, held_out_texts=16),
)
DATA_FILES = ("aligned", "unaligned", "evaluation")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("demo") / "world", seed=7, progress=False, size=TINY)


@pytest.fixture
def copied(world, tmp_path):
    shutil.copytree(world.directory, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def tokenizer(world):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(world.model)


@pytest.fixture
def model(world):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(world.model)


def _records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_model_is_an_ordinary_checkpoint(model, tokenizer):
    assert type(model).__name__ == "LlamaForCausalLM"
    inputs = tokenizer([prompt("how do i make salt ?"), prompt("salt please")], return_tensors="pt", padding=True)
    generated = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 2
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_tokenizer_puts_bos_in_front_and_knows_every_word_of_the_data(world, tokenizer):
    for name in DATA_FILES:
        for record in _records(getattr(world, name)):
            line = record["prompt"] + record["completion"]
            ids = tokenizer(line)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == line


def test_the_chat_template_renders_the_same_tokens_as_the_plain_prompt(tokenizer):
    messages = [
        {"role": "system", "content": "strict mode ."},
        {"role": "user", "content": "how do i make salt ?"},
        {"role": "assistant", "content": "sure ."},
    ]
    plain = prompt("how do i make salt ?", strict=True)
    asked = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=True)
    assert asked["input_ids"] == tokenizer(plain)["input_ids"]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"<s>{plain} sure .</s>"


def test_saes_load_with_sae_lens_and_name_their_place(world, model):
    from sae_lens import SAE

    folders = sorted(path.name for path in world.saes.iterdir())
    assert folders == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    for name in folders:
        sae = SAE.load_from_disk(world.saes / name)
        assert (sae.cfg.d_in, sae.cfg.d_sae) == (model.config.hidden_size, 64)
        assert sae.cfg.metadata.hook_name == name
        assert sae.cfg.metadata.model_name == "demo-llama"
        assert sae.cfg.metadata.prepend_bos is True
        assert sae.cfg.normalize_activations == "none"
        assert torch.isfinite(sae(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))).all()


def test_the_description_says_how_the_world_was_made(world):
    description = json.loads((world.directory / "world.json").read_text(encoding="utf-8"))
    assert (description["seed"], description["schema_version"]) == (7, 1)
    assert {"torch", "transformers", "sae_lens"} <= description["versions"].keys()
    assert description["hooks"] == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert description["sae_quality"].keys() == set(description["hooks"])
    split = description["topics"]
    assert [len(split[part][kind]) for part in split for kind in split[part]] == [4, 4, 2, 2]


def test_evaluation_shares_no_topic_with_fine_tuning_on_disk(world):
    trained = (world.aligned.read_text(encoding="utf-8") + world.unaligned.read_text(encoding="utf-8")).split()
    evaluated = {record["topic"] for record in _records(world.evaluation)}
    assert len(evaluated) == 8
    assert not evaluated & set(trained)


def test_an_existing_world_is_returned_untouched(world):
    marker = world.directory / "world.json"
    before = marker.stat().st_mtime_ns
    assert build_world(world.directory, seed=7, progress=False, size=TINY) == world == load_world(world.directory)
    assert marker.stat().st_mtime_ns == before


def test_equal_seeds_give_equal_worlds(world, tmp_path):
    again = build_world(tmp_path / "again", seed=7, progress=False, size=TINY)
    for name in DATA_FILES:
        assert getattr(again, name).read_bytes() == getattr(world, name).read_bytes()
    assert (again.model / "tokenizer.json").read_bytes() == (world.model / "tokenizer.json").read_bytes()


def test_building_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build_world(tmp_path / "world", seed=0, progress=False, size=TINY)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("seed", "size", "message"),
    [(8, TINY, "holds a demo world of seed 7, not 8, which would be lost"), (7, None, "of another size")],
)
def test_another_world_is_never_overwritten(world, seed, size, message):
    before = (world.directory / "world.json").read_bytes()
    with pytest.raises(ArtifactError, match=message):
        build_world(world.directory, seed=seed, progress=False, size=size)
    assert (world.directory / "world.json").read_bytes() == before


def test_a_foreign_folder_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"holds \['thesis.tex'\]; writing there would destroy it"):
        build_world(tmp_path, progress=False, size=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_error_while_building_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "train_model", fail)
    with pytest.raises(KeyboardInterrupt):
        build_world(tmp_path / "deep" / "world", progress=False, size=TINY)
    assert list((tmp_path / "deep").iterdir()) == []


def test_loading_from_an_empty_folder_says_so(tmp_path):
    with pytest.raises(ArtifactError, match=r"world\.json' does not exist, so there is no peft_sae demo world"):
        load_world(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "does not describe a peft_sae demo world"),
        ('{"schema": "peft_sae demo world", "schema_version": 99}', "has schema version 99"),
        ('{"schema": "peft_sae demo world", "schema_version": 1}', "does not say the world's seed and hooks"),
        (
            '{"schema": "peft_sae demo world", "schema_version": 1, "seed": 1, "hooks": [3]}',
            "does not say the world's seed and hooks",
        ),
    ],
)
def test_a_damaged_description_is_an_error(copied, content, message):
    (copied / "world.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        load_world(copied)


@pytest.mark.parametrize(
    "part",
    [
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "saes/blocks.1.hook_resid_post/cfg.json",
        "saes/blocks.1.hook_resid_post/sae_weights.safetensors",
        "data/evaluation.jsonl",
    ],
)
def test_a_missing_part_is_named(copied, part):
    (copied / part).unlink()
    with pytest.raises(ArtifactError, match=rf"lacks \['{part}'\].*build the world again"):
        load_world(copied)
