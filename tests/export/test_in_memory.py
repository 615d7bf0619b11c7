import json
from importlib.util import find_spec

import pytest
import torch
import transformers
from safetensors.torch import load_file

from peft_sae import merge_checkpoint
from peft_sae.errors import ConfigError
from tests.export.test_merge import OPTIONS, lora, merge_whole, read_folder, save_base
from tests.tiny import make_model

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
quantised = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|no longer tied|save_embedding_layers).*:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_both_ways_give_the_same(option, tied, tmp_path):
    model = make_model(tie_word_embeddings=tied, attention_bias=True)
    base = save_base(model, tmp_path / "base")
    adapter = lora(model, tmp_path / "adapter", **{"target_modules": "all-linear", **OPTIONS[option]})

    merge_checkpoint(base, adapter, tmp_path / "whole", in_memory=True)
    merge_checkpoint(base, adapter, tmp_path / "pieces")

    whole, pieces = (read_folder(tmp_path / name) for name in ("whole", "pieces"))
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "pieces")]
    assert configs[0]["tie_word_embeddings"] == configs[1]["tie_word_embeddings"]


def test_half_precision_is_rounded_once_in_memory_too(tmp_path):
    base = save_base(make_model().to(torch.bfloat16), tmp_path / "base")
    adapters = [lora(make_model(), tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]

    merge_checkpoint(base, adapters, tmp_path / "merged", in_memory=True)

    exact = merge_whole(base, adapters, tmp_path / "expected", dtype=torch.float32)
    for name, tensor in read_folder(tmp_path / "merged").items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name


def quantise(base, folder, kind):
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if kind == "nf4" else {"load_in_8bit": True}
    config = transformers.BitsAndBytesConfig(**fields)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    return save_base(model, folder, save_original_format=False)


@quantised
@pytest.mark.filterwarnings("ignore:Merge lora module to [48]-bit linear:UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_refused_merged_again_or_dequantised(kind, tmp_path):
    base = save_base(make_model(**WIDE), tmp_path / "base")
    few = quantise(base, tmp_path / "quantised", kind)
    adapter = lora(make_model(**WIDE), tmp_path / "adapter")

    with pytest.raises(ConfigError, match=r"is quantised \(bitsandbytes\).*--in-memory"):
        merge_checkpoint(few, adapter, tmp_path / "merged")
    merge_checkpoint(few, adapter, tmp_path / "again", in_memory=True)
    merge_checkpoint(few, adapter, tmp_path / "plain", in_memory=True, dtype="bfloat16")

    again, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "plain"))
    assert again["quantization_config"]["quant_method"] == "bitsandbytes"
    assert "quantization_config" not in plain
    weights = load_file(adapter / "adapter_model.safetensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(few).dequantize(dtype=torch.float32)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").dequantize(dtype=torch.float32)
    for name, before in loaded.state_dict().items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (weights.get(f"{stem}.lora_{which}.weight") for which in "AB")
        exact = before if a is None else before + 2 * (b @ a)
        torch.testing.assert_close(merged[name].float(), exact, rtol=2**-7, atol=2**-7 * float(exact.abs().max()))
        # a few bits for each block of 64 values
        bound = (0.2 if kind == "nf4" else 0.02) * float(exact.abs().max())
        torch.testing.assert_close(reloaded.state_dict()[name].float(), exact, rtol=0, atol=bound)
