"""The benchmark's base models: one per seed, each with its own language, pretraining and SAEs, made once and kept."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import digest_of
from benchmarks.safety.language import Language, digest_of_texts, make_language, pretraining_texts, vocabulary
from peft_sae import load_saes
from peft_sae.demo.model import make_tokenizer, tokenise, train_model
from peft_sae.demo.saes import hook_name, measure, residual_streams, train_sae
from peft_sae.demo.size import ModelSize, SaeSize
from peft_sae.errors import ConfigError
from peft_sae.sae.handle import SaeHandle
from peft_sae.writing import replace_folder


@dataclass(frozen=True)
class Size:
    """How large the bases are.

    Attributes:
        model: the language model.
        saes: its SAEs.
        corpus: held-out texts that the language-model loss is measured on.
        validation: topics for choosing learning rates.
        test: topics of each test set.
    """

    model: ModelSize = field(default_factory=lambda: ModelSize(layers=4, hidden=64, heads=4, steps=2400, batch=24))
    saes: SaeSize = field(
        default_factory=lambda: SaeSize(layers=(0, 1, 2), width=512, active=8, steps=1200, batch=512, texts=6000)
    )
    corpus: int = 400
    validation: int = 40
    test: int = 80


QUICK = Size(
    ModelSize(layers=4, hidden=64, heads=4, steps=120, batch=16),
    SaeSize(layers=(0, 1), width=128, active=6, steps=60, batch=256, texts=400, held_out_texts=100),
    corpus=60,
    validation=8,
    test=8,
)


@dataclass(frozen=True)
class Base:
    """A base model with what belongs to it.

    Attributes:
        language: its topics.
        folder: of the checkpoint.
        tokenizer: a word per token.
        saes: on its residual stream.
        corpus: held-out texts of the kind that it was trained on.
    """

    language: Language
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    saes: list[SaeHandle]
    corpus: list[str]

    @property
    def ground(self) -> dict[str, str | None]:
        """SHA-256 of weights, SAEs and texts, which every run on this base shares.

        Weights of one seed may differ from machine to machine.
        """
        return {
            "weights": digest_of(str(self.folder / "model.safetensors")),
            "saes": digest_of(str(self.folder.parent / "saes")),
            "texts": digest_of_texts(self.language),
        }

    def load(self) -> LlamaForCausalLM:
        """Return the model anew."""
        return LlamaForCausalLM.from_pretrained(self.folder).eval()


def make_base(root: Path, seed: int, size: Size, *, progress: bool) -> Base:
    """Return the base of a seed, which is trained if it is not there yet."""
    folder = root / f"base-{seed}"
    language = make_language(seed, validation=size.validation, test=size.test)
    description = json.loads(json.dumps({"seed": seed, "size": asdict(size)}))
    if not folder.is_dir():
        with replace_folder(folder) as scratch:
            quality = _train(language, size, scratch, progress)
            (scratch / "base.json").write_text(json.dumps({**description, "saes": quality}, indent=1))
    found: dict[str, Any] = json.loads((folder / "base.json").read_text())
    found.pop("saes")
    if found != description:
        raise ConfigError(f"'{folder}' holds a base of another size. Remove it, or give another --folder.")
    corpus = pretraining_texts(language, size.corpus, random.Random(f"{seed}/corpus"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return Base(language, folder / "model", tokenizer, load_saes(folder / "saes"), corpus)


def _train(language: Language, size: Size, folder: Path, progress: bool) -> dict[str, Any]:
    from sae_lens import SAE

    tokenizer, draw = make_tokenizer(vocabulary(language)), partial(pretraining_texts, language)
    model = train_model(draw, tokenizer, size.model, seed=language.seed, progress=progress)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(f"{language.seed}/saes")
    texts, held_out = draw(size.saes.texts, rng), draw(size.saes.held_out_texts, rng)
    streams = residual_streams(model, tokenizer, texts, size.saes.layers)
    unseen = residual_streams(model, tokenizer, held_out, size.saes.layers)
    quality = {}
    for layer in size.saes.layers:
        place = folder / "saes" / hook_name(layer)
        sae = train_sae(streams[layer], layer, size.saes, language.seed, progress=progress)
        sae.save_inference_model(place)
        quality[hook_name(layer)] = asdict(measure(SAE.load_from_disk(place), unseen[layer]))
    return quality


@torch.inference_mode()
def corpus_loss(model: Any, base: Base, *, batch: int = 100) -> float:
    """Mean next-token loss in nats on the base's corpus."""
    total, count = 0.0, 0
    for start in range(0, len(base.corpus), batch):
        ids = tokenise(base.tokenizer, base.corpus[start : start + batch])
        labels = ids.masked_fill(ids == base.tokenizer.pad_token_id, -100)
        tokens = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=ids, labels=labels).loss) * tokens
        count += tokens
    return total / count
