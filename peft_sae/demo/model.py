"""A small base model: an ordinary tokenizer and a Llama, trained on texts of a made-up language."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .size import ModelSize

# Longest sequence that the model can read; the language's texts have at most half as many tokens.
CONTEXT_SIZE = 64

_PAD, _BOS, _EOS, _UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
_IGNORED_LABEL = -100
_POOL = 4

# Renders what `language.prompt` gives. As with Llama and Gemma the template itself adds the BOS.
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }} "
    "{% elif message['role'] == 'user' %}user : {{ message['content'] }} assistant :"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def make_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a fast tokenizer with one token per word, which puts BOS in front of every text."""
    words = [_PAD, _BOS, _EOS, _UNKNOWN, *vocabulary]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A $B:1", special_tokens=[(_BOS, words.index(_BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_SIZE,
        model_input_names=["input_ids", "attention_mask"],
    )


def tokenise(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """Return token ids, int64 [texts, longest], with BOS in front, EOS behind and padding on the right."""
    rows = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(list(texts))["input_ids"]]
    return pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)


def train_model(
    draw: Callable[[int, random.Random], list[str]],
    tokenizer: PreTrainedTokenizerFast,
    size: ModelSize,
    *,
    seed: int,
    progress: bool,
) -> LlamaForCausalLM:
    """Train a causal language model on freshly drawn texts and return it in evaluation mode.

    Args:
        draw: returns so many texts, drawn with the given source of randomness.
        tokenizer: made by `make_tokenizer` from the words of these texts.
        size: shape and length of training.
        seed: decides initial weights and texts.
        progress: show a progress bar.
    """
    rng = random.Random(f"{seed}/pretraining")
    model = _initial_model(seed, tokenizer, size)
    optimiser = AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = OneCycleLR(optimiser, size.learning_rate, total_steps=size.steps, pct_start=0.1)
    model.train()
    batches = _batches(draw, size.batch, rng)
    for _ in tqdm(range(size.steps), desc="base model", disable=not progress):
        ids = tokenise(tokenizer, next(batches))
        # Padding stands on the right, where causal attention never sees it: no mask is needed.
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, _IGNORED_LABEL)
        model(input_ids=ids, labels=labels).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return model.eval()


def _batches(draw: Callable[[int, random.Random], list[str]], size: int, rng: random.Random) -> Iterator[list[str]]:
    """Endless batches of texts of about one length, as padding would be a third of mixed ones."""
    while True:
        texts = sorted(draw(_POOL * size, rng), key=lambda text: text.count(" "))
        starts = list(range(0, len(texts), size))
        rng.shuffle(starts)
        yield from (texts[start : start + size] for start in starts)


def _initial_model(seed: int, tokenizer: PreTrainedTokenizerFast, size: ModelSize) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=CONTEXT_SIZE,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    # transformers draws initial weights from torch's global generator.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
