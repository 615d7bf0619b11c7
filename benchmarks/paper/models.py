"""The models of an experiment, as they were trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import digest_of
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.train import identity_of, training_record
from peft_sae.errors import ArtifactError
from peft_sae.jobs.models import load_model


@dataclass(frozen=True)
class Trained:
    """A model that can be asked.

    Attributes:
        method: whose it is.
        identity: digest of what the model is; equal ones give equal answers.
        model: in evaluation mode, without gradients.
        tokenizer: its tokenizer.
    """

    method: str
    identity: str
    model: Any
    tokenizer: Any


def load_trained(experiment: Experiment, method: str) -> Trained:
    """Load the model of a method, its adapter not merged, so that no weights are rounded.

    Raises:
        ConfigError, ArtifactError: it was not trained, or cannot be loaded.
    """
    identity = identity_of(experiment, method)
    spec, job = experiment.methods[method], experiment.adapted_job(method)
    record = training_record(experiment, method)
    if record is not None and digest_of(job.output) != record["identity"]:
        raise ArtifactError(
            f"The weights in '{job.output}' are not those that were trained, so their answers would pass for those of "
            "others. Put the trained ones back, or remove the method's folder to train anew."
        )
    dtype = experiment.generation.dtype or experiment.job.dtype
    device = experiment.generation.device or ("cuda" if torch.cuda.is_available() else None)
    source = job.output if spec.kind == "full" else job.model
    bits = None if spec.kind == "full" else job.bits
    model, tokenizer = load_model(
        source, dtype=dtype, device=device, attn_implementation=job.attn_implementation, bits=bits
    )
    if spec.kind in ("lora", "sae_subspace"):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job.output).get_base_model()
    return Trained(method, identity, model.eval().requires_grad_(False), tokenizer)
