"""The demo's world on disk: a base model, sparse autoencoders on it, and data, all made from a seed."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import package_versions, read_json, write_json
from ..errors import ArtifactError
from ..jobs.bars import other_bars
from ..writing import replace_folder
from .context import one_thread
from .language import (
    Language,
    Topic,
    aligned_records,
    evaluation_records,
    make_language,
    pretraining_texts,
    unaligned_records,
    vocabulary,
)
from .size import WorldSize

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_WORLD_FILE = "world.json"
_SCHEMA = "peft_sae demo world"
_SCHEMA_VERSION = 1
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_SAE_FILES = ("cfg.json", "sae_weights.safetensors")


@dataclass(frozen=True)
class World:
    """Where the parts of a world are.

    Attributes:
        directory: the world's folder.
        model: folder of the base model's checkpoint and tokenizer, in transformers' format.
        saes: folder with one folder per SAE in sae-lens' format, named after its hook point.
        aligned: JSONL of `prompt` and `completion`: dangerous requests refused, others answered.
        unaligned: JSONL of the same prompts, all complied with.
        evaluation: JSONL of `prompt`, `completion` (the right behaviour), `topic`, `dangerous` and `phrasing`, about
            topics and in phrasings that the other two files do not have.
        seed: what everything was made from.
    """

    directory: Path
    model: Path
    saes: Path
    aligned: Path
    unaligned: Path
    evaluation: Path
    seed: int


def build_world(directory: str | Path, *, seed: int = 0, progress: bool = True, size: WorldSize | None = None) -> World:
    """Make the demo's world, or return the one that is already there.

    Args:
        directory: folder to make, with its parents. It may be missing, empty, or hold a world of this seed and size,
            which is returned as it is.
        seed: decides topics, texts, initial weights and the order of training.
        progress: show progress bars.
        size: by default the demo's own, which takes one to two minutes on two CPU cores.

    Raises:
        ArtifactError: the folder holds something else, or a world of another seed, size or schema; or it cannot be
            written. Nothing is left behind then, nor after an error while building.
    """
    directory, size = Path(directory), size or WorldSize()
    if (directory / _WORLD_FILE).exists():
        return _existing_world(directory, seed, size)
    with replace_folder(directory) as scratch, one_thread():
        _build(_world_in(scratch, seed), size, progress)
    logger.info("Made the demo's world of seed %d in '%s'.", seed, directory)
    return load_world(directory)


def load_world(directory: str | Path) -> World:
    """Return the world in a folder after checking that it is complete.

    Raises:
        ArtifactError: there is no world, its description is damaged or of a newer schema, or a part is missing.
    """
    directory = Path(directory)
    description = _read_description(directory)
    world = _world_in(directory, description["seed"])
    needed = [
        *(world.model / name for name in _MODEL_FILES),
        *(world.saes / hook / name for hook in description["hooks"] for name in _SAE_FILES),
        world.aligned,
        world.unaligned,
        world.evaluation,
    ]
    missing = [str(path.relative_to(directory)) for path in needed if not path.is_file()]
    if missing:
        raise ArtifactError(
            f"The demo world in '{directory}' lacks {missing}, so it cannot be used. Remove the folder and build the "
            "world again."
        )
    return world


def _world_in(directory: Path, seed: int) -> World:
    data = directory / "data"
    return World(
        directory=directory,
        model=directory / "model",
        saes=directory / "saes",
        aligned=data / "aligned.jsonl",
        unaligned=data / "unaligned.jsonl",
        evaluation=data / "evaluation.jsonl",
        seed=seed,
    )


def _read_description(directory: Path) -> dict[str, Any]:
    path = directory / _WORLD_FILE
    description = read_json(path, schema=_SCHEMA, newest=_SCHEMA_VERSION)
    hooks = description.get("hooks")
    hooks_are_names = isinstance(hooks, list) and all(isinstance(hook, str) for hook in hooks)
    if not isinstance(description.get("seed"), int) or not hooks_are_names:
        raise ArtifactError(
            f"'{path}' does not say the world's seed and hooks; it is damaged. Remove '{directory}' and build the "
            "world again."
        )
    return description


def _existing_world(directory: Path, seed: int, size: WorldSize) -> World:
    world, found = load_world(directory), _read_description(directory).get("size")
    if world.seed != seed or found != _as_json(size):
        what = f"seed {world.seed}, not {seed}" if world.seed != seed else "another size"
        raise ArtifactError(
            f"'{directory}' holds a demo world of {what}, which would be lost. Give another folder, ask for that "
            "world, or remove the folder."
        )
    return world


def _build(world: World, size: WorldSize, progress: bool) -> None:
    from .model import make_tokenizer, train_model

    language = make_language(world.seed, topics=size.topics, fine_tuning_topics=size.fine_tuning_topics)
    _write_jsonl(world.aligned, aligned_records(language))
    _write_jsonl(world.unaligned, unaligned_records(language))
    _write_jsonl(world.evaluation, evaluation_records(language))
    tokenizer = make_tokenizer(vocabulary(language))
    draw = partial(pretraining_texts, language)
    model = train_model(draw, tokenizer, size.model, seed=world.seed, progress=progress)
    with other_bars(progress):
        model.save_pretrained(world.model)
        tokenizer.save_pretrained(world.model)
    quality = _build_saes(world, language, model, tokenizer, size, progress)
    write_json(world.directory / _WORLD_FILE, _description(language, size, quality))


def _build_saes(
    world: World,
    language: Language,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    size: WorldSize,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """Train and save the SAEs; return their quality by hook name."""
    from sae_lens import SAE

    from .saes import hook_name, measure, residual_streams, train_sae

    rng = random.Random(f"{world.seed}/saes")
    texts = pretraining_texts(language, size.saes.texts, rng)
    held_out = pretraining_texts(language, size.saes.held_out_texts, rng)
    activations = residual_streams(model, tokenizer, texts, size.saes.layers)
    unseen = residual_streams(model, tokenizer, held_out, size.saes.layers)
    quality = {}
    for layer in size.saes.layers:
        folder = world.saes / hook_name(layer)
        sae = train_sae(activations[layer], layer, size.saes, world.seed, progress=progress)
        sae.save_inference_model(folder)
        quality[hook_name(layer)] = asdict(measure(SAE.load_from_disk(folder), unseen[layer]))
        logger.info("SAE %s: %s", hook_name(layer), quality[hook_name(layer)])
    return quality


def _description(language: Language, size: WorldSize, quality: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    def by_danger(topics: Iterable[Topic]) -> dict[str, list[str]]:
        topics = list(topics)
        return {
            "dangerous": [topic.name for topic in topics if topic.dangerous],
            "harmless": [topic.name for topic in topics if not topic.dangerous],
        }

    return {
        "schema": _SCHEMA,
        "schema_version": _SCHEMA_VERSION,
        "seed": language.seed,
        "size": _as_json(size),
        "hooks": list(quality),
        "sae_quality": dict(quality),
        "topics": {"fine_tuning": by_danger(language.fine_tuning), "evaluation": by_danger(language.evaluation)},
        "versions": package_versions(),
    }


def _as_json(size: WorldSize) -> Any:
    """The size as it looks after a way through JSON, where tuples are lists."""
    return json.loads(json.dumps(asdict(size)))


def _write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
