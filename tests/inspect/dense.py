"""Adapters with random factors, and what they are as dense matrices in float64."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from peft_sae import SaeSubspaceConfig, build_subspace, load_saes
from tests import tiny

HOOKS = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_pre")
# Norm gains by the conventions of each family, and whether the norm takes the mean off.
GAINS = {"llama": (0.0, False), "gemma2": (1.0, False), "gpt2": (0.0, True), "phi3": (0.0, False)}
READ_NORMS = {
    "llama": {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"},
    "phi3": {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"},
    "gemma2": {"self_attn": "input_layernorm", "mlp": "pre_feedforward_layernorm"},
    "gpt2": {"attn": "ln_1", "mlp": "ln_2"},
}
WRITE_NORMS = {"gemma2": {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}}
WRITERS = ("o_proj", "down_proj", "c_proj")


@dataclass
class Trained:
    """A trained adapter: its folders, and the model that holds it."""

    family: str
    base: Path
    adapter: Path
    model: Any
    saes: list[Any]

    @property
    def deltas(self):
        """dW of every module, [out, in], as PEFT would merge it."""
        found = {}
        for name, module in self.model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                delta = module.get_delta_weight("default").detach().double()
                found[name] = delta.T if self.family == "gpt2" else delta
        return found

    def side(self, name):
        return "write" if name.endswith(WRITERS) else "read"

    def gain(self, name):
        """Factor per channel of the norm between the stream and a module, None where there is none."""
        part = name.split(".")[-2]
        norms = (WRITE_NORMS if self.side(name) == "write" else READ_NORMS).get(self.family, {})
        if part not in norms:
            return None
        norm = self.model.get_base_model().get_submodule(f"{name[: name.index(f'.{part}.')]}.{norms[part]}")
        return norm.weight.detach().double() + GAINS[self.family][0]

    def met(self, name, directions):
        """Unit vectors along which a module reads or writes directions, by the family's own norm."""
        directions, gain = directions.double(), self.gain(name)
        if gain is not None:
            centers = GAINS[self.family][1]
            directions = (directions - directions.mean(-1, keepdim=True) if centers else directions) * gain
        return torch.nn.functional.normalize(directions, dim=-1)


def train(folder, family="llama", *, kind="sae", noise=0.1, targets="all-linear", **fields):
    """Make a base model and an adapter with moved factors, and save both."""
    model = tiny.make_model(family)
    tokenizer = tiny.make_tokenizer()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    saes = load_saes([tiny.make_sae(hook, seed=seed) for seed, hook in enumerate(HOOKS)])
    if family == "gpt2":
        fields["fan_in_fan_out"] = True
    fields = {"target_modules": targets, "task_type": "CAUSAL_LM", **fields}
    if kind == "sae":
        protect = fields.pop("build_protect", None)
        subspace = build_subspace(
            model,
            tokenizer,
            saes=saes,
            aligned=tiny.ALIGNED,
            unaligned=tiny.UNALIGNED,
            top_k=4,
            progress=False,
            **({} if protect is None else {"protect": protect}),
        )
        config = SaeSubspaceConfig(subspace=subspace, **{"r": "auto", **fields})
    else:
        config = LoraConfig(**{"r": 4, **fields})
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder / "adapter")
    return Trained(family, folder / "base", folder / "adapter", adapted, saes)
