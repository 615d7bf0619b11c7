"""Architectures whose checkpoints transformers renames, joins or ties in ways that the families do not show."""

import pytest
import transformers
from peft import LoraConfig

from peft_sae import merge_checkpoint
from tests.export.test_merge import assert_same, merge_whole, read_folder, save_adapter

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
SEQUENCE = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
CASES = {
    # shared and routed experts, first block dense, latent attention
    "DeepseekV3ForCausalLM": {
        **{**SMALL, "num_key_value_heads": 4},
        **EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "Qwen2MoeForCausalLM": {**SMALL, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    # experts are stored joined
    "GptOssForCausalLM": {**SMALL, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    # a text model within another
    "Gemma3ForConditionalGeneration": {
        "text_config": {**SMALL, "head_dim": 8},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 19,
    },
    # tensors that are tied three times
    "T5ForConditionalGeneration": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 20,
    },
    # a buffer that is stored
    "BartForConditionalGeneration": {
        **SEQUENCE,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "vocab_size": 20,
    },
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 20},
}
TARGETS = {
    "DeepseekV3ForCausalLM": {"target_modules": ["q_a_proj", "kv_b_proj", "o_proj"]},
    "GptOssForCausalLM": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
    "Qwen2MoeForCausalLM": {
        "target_modules": "all-linear",
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
}


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_finds_its_way_there_and_back(name, tmp_path):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**CASES[name]))
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, **TARGETS.get(name, {"target_modules": "all-linear"}))
    adapter = save_adapter(model, config, tmp_path / "adapter")

    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")

    assert_same(read_folder(tmp_path / "merged"), merge_whole(tmp_path / "base", [adapter], tmp_path / "expected"))
