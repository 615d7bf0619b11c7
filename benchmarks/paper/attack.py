"""GCG attacks (arXiv 2307.15043) through nanogcg, cached prompt by prompt."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.paper.data import Prompt
from benchmarks.paper.generate import encode_prompt
from benchmarks.paper.lines import key_of, open_lines
from benchmarks.paper.models import Trained
from benchmarks.paper.specs import AttackSpec, GenerationSpec
from peft_sae.errors import ConfigError, DataError, suggest

_PLACE = "{optim_str}"


@dataclass(frozen=True)
class Attacked:
    """A prompt with a suffix that is to make a model comply.

    Attributes:
        prompt: the prompt as it was.
        text: the prompt with the suffix.
        loss_before: mean negative log-likelihood of the target after the prompt alone.
        loss_after: likewise after the prompt with the suffix, as text.
    """

    prompt: Prompt
    text: str
    loss_before: float
    loss_after: float


def check_settings(spec: AttackSpec) -> None:
    """Check the attack's settings before anything is loaded.

    Raises:
        ConfigError: nanogcg does not know one, or it cannot work.
    """
    import nanogcg

    known = {entry.name: entry.default for entry in fields(nanogcg.GCGConfig)}
    for name, value in spec.settings.items():
        if name not in known:
            raise ConfigError(f"attack.settings.{name}: nanogcg.GCGConfig has no such field.{suggest(name, known)}")
        # A number where the default is one; the counts among them are of steps, candidates and tokens.
        kind = type(known[name])
        if kind in (bool, int) and (type(value) is not kind or (kind is int and value < min(1, known[name]))):
            wanted = "true or false" if kind is bool else f"an integer from {min(1, known[name])}"
            raise ConfigError(f"attack.settings.{name}={value!r}: nanogcg would fail at it. Give {wanted}.")
    if spec.settings.get("use_prefix_cache"):
        raise ConfigError(
            "attack.settings.use_prefix_cache: nanogcg takes a model's cache for a list, which those of transformers 5 "
            "are not. Leave it out."
        )
    if "seed" in spec.settings or "verbosity" in spec.settings:
        raise ConfigError("attack.settings has 'seed' or 'verbosity'. The experiment's own seed is used; remove them.")


def chosen_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return so many prompts, evenly over the set, so that its categories keep their shares."""
    count = min(count, len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]


def attack(
    load: Callable[[], Trained],
    identity: str,
    prompts: Sequence[Prompt],
    spec: AttackSpec,
    generation: GenerationSpec,
    path: Path,
    *,
    seed: int,
    label: str,
    progress: bool,
) -> list[Attacked]:
    """Find a suffix for every prompt, except those for which that was done.

    Args:
        load: gives the model, and is only called if there is something to do.
        identity: the model's.
        prompts: what is attacked.
        spec: how.
        generation: how prompts are put.
        path: the cache.
        seed: of the search.
        label: of the progress bar.
        progress: show it.

    Raises:
        DataError: a prompt has nanogcg's place for the suffix in it.
    """
    taken = next((prompt for prompt in prompts if _PLACE in prompt.text), None)
    if taken is not None:
        raise DataError(
            f"Prompt {taken.id} of the attacked set has {_PLACE!r} in it, which is where nanogcg puts its suffix. "
            "Change it, or attack another set."
        )
    form = generation.prompt_form
    keys = [key_of("gcg", identity, prompt.text, spec.target, dict(spec.settings), form, seed) for prompt in prompts]
    with open_lines(path) as cache:
        left = cache.missing(keys, prompts)
        if left:
            trained = load()
            for key, prompt in tqdm(left.items(), desc=label, unit=" prompts", disable=not progress):
                cache.add(key, _attack_one(trained, prompt.text, spec, generation, seed))
        return [
            Attacked(prompt, cache[key]["text"], cache[key]["loss_before"], cache[key]["loss_after"])
            for prompt, key in zip(prompts, keys, strict=True)
        ]


def _attack_one(
    trained: Trained, prompt: str, spec: AttackSpec, generation: GenerationSpec, seed: int
) -> dict[str, Any]:
    suffix = find_suffix(trained, prompt, spec, generation, seed)
    text = f"{prompt} {suffix}"
    losses = {
        name: target_loss(trained, asked, spec.target, generation)
        for name, asked in (("loss_before", prompt), ("loss_after", text))
    }
    return {"method": trained.method, "prompt": prompt, "suffix": suffix, "text": text, **losses}


def find_suffix(trained: Trained, prompt: str, spec: AttackSpec, generation: GenerationSpec, seed: int) -> str:
    """Return the suffix after which the model finds the target's tokens most likely."""
    import nanogcg
    from nanogcg.gcg import GCG

    settings: dict[str, Any] = {"use_prefix_cache": False, **spec.settings, "seed": seed, "verbosity": "ERROR"}
    config = nanogcg.GCGConfig(**settings)
    tokenizer = copy.deepcopy(trained.tokenizer)  # nanogcg gives it a template, if it has none
    if generation.prompt_form is not None:
        tokenizer.chat_template = _as_template(generation.prompt_form)
    with _nanogcg_kept_quiet(), torch.random.fork_rng():
        search = GCG(trained.model, tokenizer, config)
        search.embedding_layer = scaled_embeddings(trained.model)
        found = search.run([{"role": "user", "content": f"{prompt} {_PLACE}"}], spec.target)
    return str(found.best_string)


def _as_template(form: str) -> str:
    """A chat template that puts a prompt in a form."""
    before, after = form.split("{prompt}")
    return f"{{{{ {json.dumps(before)} }}}}{{{{ messages[0]['content'] }}}}{{{{ {json.dumps(after)} }}}}"


@contextmanager
def _nanogcg_kept_quiet() -> Iterator[None]:
    """Without its inner progress bars and its logging, and without the global switch that it leaves on.

    It also collects garbage after every batch, which is quick if it need not look through what is there before.
    """
    import gc
    import logging

    import nanogcg.gcg as module

    bar, deterministic = module.tqdm, torch.are_deterministic_algorithms_enabled()
    level = logging.getLogger("nanogcg").level
    logging.getLogger("nanogcg").setLevel(logging.ERROR)
    module.tqdm = partial(tqdm, disable=True)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        module.tqdm = bar
        logging.getLogger("nanogcg").setLevel(level)
        torch.use_deterministic_algorithms(deterministic)


class _Scaled:
    """Embeddings whose `weight` is what they give out, which is what nanogcg takes it for."""

    def __init__(self, layer: Any, scale: torch.Tensor) -> None:
        self._layer = layer
        self.weight, self.num_embeddings = layer.weight * scale.to(layer.weight.dtype), layer.num_embeddings

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._layer(ids)
        return found


def scaled_embeddings(model: Any) -> Any:
    """Return a model's embeddings in the form that nanogcg needs.

    It reads the gradient at one-hot vectors times `weight`. Gemma's layer multiplies that with a scale, so without it
    the gradient would be that of embeddings 48 times too short (Gemma-2-2B).

    Raises:
        ConfigError: they do something else to their weights.
    """
    layer = model.get_input_embeddings()
    scale = getattr(layer, "embed_scale", None)
    found = layer if scale is None else _Scaled(layer, torch.as_tensor(scale))
    ids = torch.arange(min(8, layer.num_embeddings), device=layer.weight.device)
    if not torch.allclose(found.weight[ids], layer(ids), rtol=1e-2):
        raise ConfigError(
            f"The embeddings of a {type(model).__name__} are not rows of their weights times a scale, so GCG's "
            "gradient would be a wrong one. Leave out 'attack' for this model."
        )
    return found


@torch.inference_mode()
def target_loss(trained: Trained, prompt: str, target: str, generation: GenerationSpec) -> float:
    """Return the mean negative log-likelihood of a target's tokens after a prompt in its form."""
    before = encode_prompt(trained.tokenizer, prompt, generation)
    wanted = trained.tokenizer(target, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*before, *wanted]], device=trained.model.device)
    logits = trained.model(input_ids=ids).logits[0, len(before) - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, len(before) :]))


def losses_of(found: Sequence[Attacked]) -> Mapping[str, float]:
    """Return the means of the losses, which show whether the search works where nothing succeeds."""
    return {name: sum(getattr(one, name) for one in found) / len(found) for name in ("loss_before", "loss_after")}
