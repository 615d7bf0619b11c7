"""Tiny models, tokenizer, SAEs and classifier with random weights from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_WIDTH, _BLOCKS, _VOCABULARY = 32, 3, 384
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_BASIS_BLOCKS = (0, 1)


def write_models(folder: Path, family: str, texts: Sequence[str], *, seed: int) -> None:
    """Write a model with its tokenizer into `model` and SAEs on its residual stream into `saes`.

    Args:
        folder: where.
        family: `gemma2` or `llama`.
        texts: what the tokenizer learns its words from.
        seed: of all weights.
    """
    import transformers

    tokenizer = make_tokenizer(texts)
    settings = {
        **{"vocab_size": len(tokenizer), "hidden_size": _WIDTH, "intermediate_size": 48, "num_hidden_layers": _BLOCKS},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    name = {"gemma2": "Gemma2", "llama": "Llama"}[family]
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # initial weights are so small that blocks hardly matter
                parameter.data *= 4
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for block in _BASIS_BLOCKS:
        hook = f"blocks.{block}.hook_resid_post"
        make_sae(hook, family, seed + block).save_model(folder / "saes" / hook)


def make_tokenizer(texts: Sequence[str]) -> Any:
    """Return a byte-level tokenizer like Llama's, without a chat template, as the base models have none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def make_sae(hook: str, family: str, seed: int) -> Any:
    """Return an SAE of the architecture that the family's published ones have."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    features, generator = 64, torch.Generator().manual_seed(seed)
    sae_cls, config_cls = get_sae_class("jumprelu")
    metadata = SAEMetadata(hook_name=hook, model_name=f"stand-in-{family}", prepend_bos=True)
    sae = sae_cls(config_cls(d_in=_WIDTH, d_sae=features, metadata=metadata))
    sae.W_enc.data = torch.randn(_WIDTH, features, generator=generator) / _WIDTH**0.5
    sae.W_dec.data = torch.randn(features, _WIDTH, generator=generator)
    sae.b_enc.data = 0.1 * torch.randn(features, generator=generator)
    sae.b_dec.data = 0.1 * torch.randn(_WIDTH, generator=generator)
    sae.threshold.data = 0.1 * torch.randn(features, generator=generator).abs()
    return sae


def write_classifier(folder: Path, model: Path, labels: Sequence[str], *, seed: int) -> None:
    """Write a classifier with given labels and the tokenizer of a model."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(model)
    names = dict(enumerate(map(str, labels)))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        id2label=names,
        label2id={label: index for index, label in names.items()},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = BertForSequenceClassification(config)
        for parameter in classifier.parameters():
            if parameter.dim() > 1:
                parameter.data *= 8
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
