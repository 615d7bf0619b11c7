"""sae-lens' own model, with the weights of a plain one: the oracle of the parity tests."""

from __future__ import annotations

import warnings

import torch
from sae_lens import HookedSAETransformer
from transformer_lens.config import HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions
from transformers import PreTrainedModel


def make_hooked(model: PreTrainedModel, **processing: bool) -> HookedSAETransformer:
    """Return a HookedSAETransformer that computes what a tiny GPT-2, Llama or Gemma-2 does, by code of its own.

    `processing` are the settings of `load_and_process_state_dict`, all off if nothing is said.
    """
    config = model.config
    family = config.model_type
    settings = {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings,
        "dtype": torch.float32,
        "use_hook_mlp_in": True,
        "original_architecture": type(model).__name__,
    }
    if family == "gpt2":
        settings |= {"d_head": config.n_embd // config.n_head, "d_mlp": 4 * config.n_embd, "act_fn": "gelu_new"}
        settings |= {"normalization_type": "LN", "eps": config.layer_norm_epsilon}
        state = weight_conversions.convert_gpt2_weights
    else:
        settings |= {"d_head": config.head_dim, "d_mlp": config.intermediate_size, "gated_mlp": True}
        settings |= {"normalization_type": "RMS", "final_rms": True, "eps": config.rms_norm_eps, "act_fn": "silu"}
        settings |= {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": False}
        settings |= {"rotary_dim": config.head_dim, "n_key_value_heads": config.num_key_value_heads}
        state = weight_conversions.convert_llama_weights
    if family == "gemma2":
        settings |= {"act_fn": "gelu_pytorch_tanh", "use_normalization_before_and_after": True}
        settings |= {"attn_scale": config.query_pre_attn_scalar**0.5, "attn_scores_soft_cap": 50.0}
        settings |= {"output_logits_soft_cap": 30.0}
        state = weight_conversions.convert_gemma_weights
    with warnings.catch_warnings():  # it is to go in TransformerLens 4, and sae-lens' is made of it
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
        hooked = HookedSAETransformer(HookedTransformerConfig(**settings))
    names = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    with torch.no_grad():
        hooked.load_and_process_state_dict(
            {name: tensor.detach().clone() for name, tensor in state(model, hooked.cfg).items()},
            **{name: processing.get(name, False) for name in names},
            refactor_factored_attn_matrices=False,
        )
    return hooked.eval()
