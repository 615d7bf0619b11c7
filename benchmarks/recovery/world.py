"""Activations with known concepts: a dictionary in superposition, two classes of texts, and SAEs of known error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary, train_toy_sae

from benchmarks.embedded import HOOK

LABELS = ("aligned", "unaligned")


@dataclass(frozen=True)
class World:
    """Concepts, and how they fire.

    Attributes:
        dictionary: unit direction of each concept, float32 [concepts, width].
        task: ids of the r concepts in which the classes differ.
        active: concepts that fire on a token, on average.
        rates: how often a task concept fires in the aligned and in the unaligned texts.
    """

    dictionary: torch.Tensor
    task: torch.Tensor
    active: float = 4.0
    rates: tuple[float, float] = (0.5, 0.02)

    @property
    def truth(self) -> torch.Tensor:
        """Orthonormal basis of the task concepts' span, float64 [r, width]."""
        return torch.linalg.qr(self.dictionary[self.task].double().T)[0].T

    def generator(self, label: str | None = None) -> ActivationGenerator:
        """Concept activations of a class of text, or of the corpus that SAEs are trained on."""
        count = len(self.dictionary)
        rates = torch.full((count,), self.active / count)
        if label is not None:
            rates[self.task] = self.rates[LABELS.index(label)]
        return ActivationGenerator(count, rates, std_firing_magnitudes=0.2, mean_firing_magnitudes=1.0)


def make_world(width: int, concepts: int, rank: int, seed: int) -> World:
    """Random unit directions, as crowded as `concepts` in `width` dimensions are, and a task of some of them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        dictionary = FeatureDictionary(concepts, width, initializer=None, seed=seed).feature_vectors.clone()
    order = torch.randperm(concepts, generator=torch.Generator().manual_seed(seed))
    return World(dictionary, order[:rank])


def draw_texts(world: World, texts: int, length: int, seed: int) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """Activations [tokens, width] of both classes one after the other, and per label the text of each token."""
    torch.manual_seed(seed)
    owners = torch.arange(texts).repeat_interleave(length)
    found = [world.generator(label).sample(texts * length) @ world.dictionary for label in LABELS]
    return torch.cat(found), dict.fromkeys(LABELS, owners)


def noised_sae(world: World, error: float, seed: int) -> SAE:
    """An SAE that knows the concepts up to an error: |decoder row - concept| = error for every one.

    Its encoder is its decoder behind a threshold, as concepts in superposition have no inverse.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(world.dictionary.shape, generator=generator, dtype=torch.float64)
    truth = world.dictionary.double()
    noise = noise - (noise * truth).sum(1, keepdim=True) * truth
    angle = 2 * torch.asin(torch.tensor(error / 2, dtype=torch.float64))  # of two unit vectors that far apart
    rows = angle.cos() * truth + angle.sin() * torch.nn.functional.normalize(noise, dim=1)
    return _sae(rows.float(), threshold=0.5)


def _sae(rows: torch.Tensor, threshold: float) -> SAE:
    sae_cls, config_cls = get_sae_class("jumprelu")
    metadata = SAEMetadata(hook_name=HOOK, prepend_bos=False)
    config = config_cls(d_in=rows.shape[1], d_sae=len(rows), metadata=metadata, apply_b_dec_to_input=False)
    sae = sae_cls(config)
    sae.W_dec.data, sae.W_enc.data = rows.clone(), rows.T.contiguous()
    sae.threshold.data = torch.full((len(rows),), threshold)
    return sae


def trained_sae(world: World, kind: str, samples: int, seed: int) -> SAE:
    """An SAE that sae-lens trains on the world's activations, as many features wide as there are concepts.

    Args:
        world: the concepts.
        kind: architecture of sae-lens: `standard`, `topk`, `batchtopk`, `jumprelu`.
        samples: activations that it sees.
        seed: of its start and of the activations.
    """
    torch.manual_seed(seed)
    concepts, width = world.dictionary.shape
    sae_cls, config_cls = get_sae_training_class(kind)
    settings: dict[str, float] = {"k": round(world.active)} if "topk" in kind else {}
    if kind == "standard":
        settings = {"l1_coefficient": 1.0, "l1_warm_up_steps": 0}  # the best of six by the decoder error
    metadata = SAEMetadata(hook_name=HOOK, prepend_bos=False)
    sae = sae_cls(config_cls(d_in=width, d_sae=concepts, metadata=metadata, **settings))
    dictionary = FeatureDictionary(concepts, width, initializer=None)
    dictionary.feature_vectors.data = world.dictionary.clone()
    steps = samples // 1024
    train_toy_sae(sae, dictionary, world.generator(), samples, lr=3e-3, lr_decay_steps=steps // 3)
    return _for_inference(sae, kind)


def _for_inference(sae: SAE, kind: str) -> SAE:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder)


def nearest_features(world: World, rows: torch.Tensor) -> torch.Tensor:
    """Ids of the decoder rows that are nearest to the task's concepts, int64 [r]."""
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    return (world.dictionary[world.task].double() @ unit.T).argmax(dim=1)


def decoder_error(world: World, rows: torch.Tensor) -> float:
    """Mean over the task's concepts of the distance to the nearest decoder direction, both of length 1."""
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    cosines = (world.dictionary[world.task].double() @ unit.T).amax(dim=1)
    return float((2 - 2 * cosines).clamp(min=0).sqrt().mean())


def subspace_error(truth: torch.Tensor, basis: torch.Tensor) -> float:
    """Length of the sines of the principal angles between two spaces, both orthonormal rows [*, width].

    It is 0 for the same space, sqrt(r - 1) for one that shares a single direction with it and is otherwise orthogonal,
    and sqrt(r) for an orthogonal one, with r the rows of `truth`.
    """
    shared = (truth.double() @ basis.double().T).square().sum()
    return float((len(truth) - shared).clamp(min=0).sqrt())
