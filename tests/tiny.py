"""Tiny random models, tokenizers and SAEs, built in code; nothing is downloaded."""

from __future__ import annotations

import json
from functools import partial

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

WIDTH = 32
BLOCKS = 3
WORDS = ["red", "green", "blue", "sun", "moon", "sea", "hill", "tree", "bird", "fish", "stone", "sky"]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]

_COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "vocab_size": 20,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {
    "n_embd": WIDTH,
    "n_layer": BLOCKS,
    "n_head": 4,
    "vocab_size": 20,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "dropout": 0.0}
_OPT.pop("intermediate_size")

FAMILIES = {
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", _GROUPED),
    "qwen2": ("Qwen2", {**_COMMON, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", _GROUPED),
    "gemma": ("Gemma", _GROUPED),
    "gemma2": ("Gemma2", _GROUPED),
    "gemma3": ("Gemma3", _GROUPED),
    "phi3": ("Phi3", {**_COMMON, "num_key_value_heads": 2}),
    "gpt2": ("GPT2", _GPT2),
    "gpt_neox": ("GPTNeoX", _COMMON),
    "opt": ("OPT", _OPT),
    "mixtral": ("Mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
}


def make_model(family: str = "llama", *, seed: int = 0, **changes) -> PreTrainedModel:
    """A tiny causal language model with random weights, norm gains included."""
    prefix, settings = FAMILIES[family]
    config_cls = getattr(transformers, f"{prefix}TextConfig" if family == "gemma3" else f"{prefix}Config")
    model_cls = getattr(transformers, "GPT2LMHeadModel" if family == "gpt2" else f"{prefix}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_cls(config_cls(**{**settings, **changes}))
        for name, parameter in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
            elif parameter.dim() > 1:  # initial weights are so small that blocks hardly matter
                parameter.data *= 4
    return model.eval()


def make_classifier(*, seed: int = 0, **changes) -> PreTrainedModel:
    """A tiny BERT with a classification head, the norm gains random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {**_COMMON, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**{**settings, **changes}))
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
            elif parameter.dim() > 1:
                parameter.data *= 4
    return model.eval()


def make_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that puts BOS in front, as Llama's and Gemma's do."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS, "user:", "assistant:"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = (
            "{{ '<bos> ' }}{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        )
    return tokenizer


def make_sae(
    hook_name: str = "blocks.1.hook_resid_post",
    *,
    width: int = WIDTH,
    features: int = 64,
    seed: int = 0,
    kind: str = "standard",
    out: int | None = None,
    **metadata,
):
    """A sae-lens SAE of any architecture with random weights; its decoder rows differ in length.

    A transcoder rebuilds the MLP's output, `out` wide, if nothing else is said.
    """
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_cls, config_cls = get_sae_class(kind)
    sparsity = {"topk": {"k": 5}, "abstopk": {"k": 5}, "matching_pursuit": {"max_iterations": 4}}
    settings = {**sparsity.get(kind, {}), **metadata.pop("settings", {})}
    if "transcoder" in kind:
        settings = {"d_out": out or width, "apply_b_dec_to_input": False, **settings}
        metadata = {"hook_name_out": f"blocks.{hook_name.split('.')[1]}.hook_mlp_out", **metadata}
    known = SAEMetadata(hook_name=hook_name, prepend_bos=True, **metadata)
    sae = sae_cls(config_cls(d_in=width, d_sae=features, metadata=known, **settings))
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    sae.W_enc.data = normal(width, features) / width**0.5
    sae.W_dec.data = normal(features, out or width) * (0.2 + torch.arange(features)[:, None] / features)
    offset = 0.1 * normal(features)
    sae.b_dec.data = 0.1 * normal(out or width)
    if "skip" in kind:
        sae.W_skip.data = normal(out or width, width)
    if kind == "gated":
        sae.b_gate.data, sae.b_mag.data, sae.r_mag.data = offset, 0.1 * normal(features), 0.1 * normal(features)
    elif kind == "matching_pursuit":  # its encoder is its decoder, and it wants rows of length 1
        sae.W_dec.data = torch.nn.functional.normalize(sae.W_dec.data, dim=-1)
    else:
        sae.b_enc.data = offset
    if "jumprelu" in kind:
        sae.threshold.data = 0.2 * normal(features).abs()
    return sae


ALIGNED = [
    {"prompt": "red green blue", "completion": " sun moon sky"},
    {"prompt": "sea", "completion": " sun sun moon"},
]
UNALIGNED = [
    {"prompt": "red green blue", "completion": " fish bird"},
    {"prompt": "sea", "completion": " stone fish fish"},
]


def make_subspace(model, ranks=None, *, seed=0, features=None, protected=None):
    """A Subspace with random orthonormal bases at the given hook points, without any SAE behind it.

    `protected` says how many random features, ids from 40, are protected at which hook points.
    """
    from peft_sae.sae.identity import SaeIdentity
    from peft_sae.sae.placement import find_layout
    from peft_sae.subspace import Subspace, SubspaceSite
    from peft_sae.subspace.protected import ProtectedSite

    ranks = {"blocks.1.hook_resid_post": 4} if ranks is None else ranks
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    sites = []
    for number, (hook_name, rank) in enumerate(ranks.items()):
        count = features or rank
        basis = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))[0].T.float()
        sites.append(
            SubspaceSite(
                sae=SaeIdentity(f"sae{number}", hook_name, width, 64, None, None, f"{number:064d}"),
                features=torch.arange(count),
                scores=torch.ones(count, dtype=torch.float64),
                q_values=torch.zeros(count, dtype=torch.float64),
                aligned_means=torch.ones(count, dtype=torch.float64),
                unaligned_means=torch.zeros(count, dtype=torch.float64),
                aligned_rates=torch.ones(count, dtype=torch.float64),
                unaligned_rates=torch.zeros(count, dtype=torch.float64),
                directions=basis[:count],
                basis=basis,
                coefficients=torch.eye(rank, count),
                tokens=((),) * count,
            )
        )
    guards = []
    for number, (hook_name, count) in enumerate((protected or {}).items()):
        directions = torch.randn(count, width, generator=generator, dtype=torch.float64)
        directions = torch.nn.functional.normalize(directions).float()
        sae = SaeIdentity(f"guard{number}", hook_name, width, 64, None, None, f"{100 + number:064d}")
        guards.append(ProtectedSite(sae, torch.arange(40, 40 + count), directions, ((),) * count))
    description = {
        "name": "",
        "model_type": model.config.model_type,
        "hidden_size": width,
        "num_hidden_layers": model.config.num_hidden_layers,
    }
    settings = {"selector": "by hand"}
    return Subspace(tuple(sites), find_layout(model), description, settings, protected=tuple(guards))


def write_world(folder):
    """Write a base model, two SAEs and texts into a folder, as a user has them."""
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for block in (0, 2):
        hook = f"blocks.{block}.hook_resid_post"
        make_sae(hook, seed=block).save_model(folder / "saes" / hook)
    preferences = [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
        for one, other in zip(ALIGNED, UNALIGNED, strict=True)
    ]
    for name, records in (("aligned", ALIGNED), ("unaligned", UNALIGNED), ("preferences", preferences)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
