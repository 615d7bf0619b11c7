"""The model, SAEs and texts that the benchmarks of the statistics run on. All weights are random; nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from peft_sae import load_saes
from peft_sae.sae.handle import SaeHandle
from peft_sae.sae.placement import check_placement
from peft_sae.statistics.batches import Batch, iterate_batches
from peft_sae.statistics.capture import capturing
from peft_sae.statistics.data import ExampleReader

VOCABULARY = 50257
PAD = 0


@dataclass(frozen=True)
class Size:
    """The shape of a run.

    Attributes:
        layers: blocks of the model.
        width: of its residual stream.
        heads: attention heads per block.
        blocks: those whose output has an SAE.
        d_sae: features per SAE.
        density: mean share of the features that fire on a token.
    """

    layers: int
    width: int
    heads: int
    blocks: tuple[int, ...]
    d_sae: int
    density: float


@dataclass(frozen=True)
class Texts:
    """Random words, made anew at each reading, so that they take no memory.

    Attributes:
        count: number of texts.
        lengths: least and greatest number of words, uniformly distributed.
        seed: of both.
    """

    count: int
    lengths: tuple[int, int] = (96, 160)
    seed: int = 0

    def __iter__(self) -> Iterator[str]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.count):
            length = int(torch.randint(self.lengths[0], self.lengths[1] + 1, (), generator=generator))
            words = torch.randint(1, VOCABULARY, (length,), generator=generator)
            yield " ".join(f"w{word}" for word in words.tolist())

    def __len__(self) -> int:
        return self.count


def make_model(size: Size, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 of the given size."""
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=size.layers, n_embd=size.width, n_head=size.heads, vocab_size=VOCABULARY)
    return GPT2LMHeadModel(config).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer with a word per id."""
    words = {"<pad>": PAD, **{f"w{index}": index for index in range(1, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def make_saes(model: PreTrainedModel, size: Size, batch: Batch, seed: int) -> list[SaeHandle]:
    """JumpReLU SAEs whose features fire at rates that differ as those of trained SAEs do.

    The rates are log-normal (a standard deviation of 1.5 in the natural logarithm) around the density, or all the same
    where half of the features are to fire; each encoder's bias is set to the feature's quantile on one batch of texts.
    """
    generator = torch.Generator().manual_seed(seed)
    handles = load_saes([_random_sae(size, block, generator).to(model.device) for block in size.blocks])
    with capturing(model, check_placement(model, handles)) as capture:
        found = capture.run(batch.ids, batch.attention)
    for handle, activations in zip(handles, found, strict=True):
        rates = torch.full((size.d_sae,), size.density)
        if size.density < 0.1:
            rates = (1.5 * torch.randn(size.d_sae, generator=generator)).exp()
            rates = (rates * size.density / rates.mean()).clamp(max=0.9)
        _set_rates(handle.sae, activations[batch.counted].float(), rates.to(model.device))
    return handles


def _random_sae(size: Size, block: int, generator: torch.Generator) -> SAE:
    sae_cls, config_cls = get_sae_class("jumprelu")
    metadata = SAEMetadata(hook_name=f"blocks.{block}.hook_resid_post", prepend_bos=False)
    sae = sae_cls(config_cls(d_in=size.width, d_sae=size.d_sae, metadata=metadata, apply_b_dec_to_input=False))
    rows = torch.nn.functional.normalize(torch.randn(size.d_sae, size.width, generator=generator), dim=1)
    sae.W_dec.data, sae.W_enc.data = rows, rows.T.contiguous()
    return sae


@torch.no_grad()
def _set_rates(sae: SAE, activations: torch.Tensor, rates: torch.Tensor) -> None:
    """Let each feature fire on its share of some activations [tokens, width]: on those above their quantile."""
    step = 2048
    for start in range(0, len(rates), step):
        part = slice(start, start + step)
        ordered = (activations @ sae.W_enc[:, part]).sort(dim=0).values
        place = (1 - rates[part]) * (len(ordered) - 1)
        low = place.long().clamp(max=len(ordered) - 2)
        ends = ordered.gather(0, torch.stack([low, low + 1]))
        quantile = torch.lerp(ends[0], ends[1], place - low)
        sae.b_enc[part] = 1 - quantile
    sae.threshold.data = torch.ones_like(sae.threshold)


def make_batches(tokenizer: PreTrainedTokenizerFast, texts: Texts, batch_size: int) -> list[Batch]:
    """The batches that `collect_statistics` makes of the texts."""
    reader = ExampleReader(tokenizer, tokens="all", max_length=1024, prepend_bos=False)
    examples = (reader.read(text, number) for number, text in enumerate(texts))
    return list(iterate_batches(examples, batch_size=batch_size, pad_id=PAD))


@torch.no_grad()
def mean_firing(handles: Sequence[SaeHandle], activations: Sequence[torch.Tensor]) -> list[float]:
    """Per SAE the mean number of features that fire on a token (L0), of activations [tokens, width]."""
    pairs = zip(handles, activations, strict=True)
    return [round(float((handle.encode(found) != 0).sum() / len(found)), 1) for handle, found in pairs]
