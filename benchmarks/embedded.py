"""A model whose embeddings are given activations, so that the engine reads them as it reads those of any model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HOOK = "blocks.0.hook_resid_pre"


def model_of(embeddings: torch.Tensor) -> LlamaForCausalLM:
    """A Llama whose token number i + 1 has row i of `embeddings` [tokens, width] for its residual stream at `HOOK`."""
    config = LlamaConfig(
        hidden_size=embeddings.shape[1],
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=len(embeddings) + 1,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.model.embed_tokens.weight.data[1:] = embeddings.float()
    return model


def tokenizer_of(words: int) -> PreTrainedTokenizerFast:
    """A tokenizer with the words w1, w2, and so on, a token each."""
    vocabulary = {"<pad>": 0, **{f"w{index}": index for index in range(1, words + 1)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def texts_of(owners: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Texts that use each word once, in order: per label the text of each token is given, int64 [tokens]."""
    words = iter(range(1, sum(len(found) for found in owners.values()) + 1))
    return {
        label: [" ".join(f"w{next(words)}" for _ in range(count)) for count in torch.bincount(found).tolist()]
        for label, found in owners.items()
    }
