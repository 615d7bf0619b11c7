"""Dense oracles in float64: whole matrices, and what every module meets, by the norms' own weights."""

import re

import torch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

import peft_sae  # noqa: F401  (registers the type)


def updates(adapter):
    """dW [out, in] of every module, float64, from the file alone."""
    config = PeftConfig.from_pretrained(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)
        if match:
            b = tensors[key.replace("lora_A", "lora_B")]
            scaling = config.lora_alpha / a.shape[0]
            found[match[1]] = scaling * b.double() @ a.double()
    return found


def gain_of(norm, width):
    """The gain of a norm and whether it centres, by differentiating what it does to a vector of equal squares."""
    weight = norm.weight.double()
    if "Gemma" in type(norm).__name__:
        weight = 1 + weight
    return weight, isinstance(norm, torch.nn.LayerNorm)


# Which modules of a block read and write the stream, and the norm between: written down, not asked from the package.
ROLES = {
    "llama": (
        "model.layers",
        {
            **{f"self_attn.{name}_proj": ("read", "input_layernorm") for name in "qkv"},
            "self_attn.o_proj": ("write", None),
            "mlp.gate_proj": ("read", "post_attention_layernorm"),
            "mlp.up_proj": ("read", "post_attention_layernorm"),
            "mlp.down_proj": ("write", None),
        },
    ),
    "gemma2": (
        "model.layers",
        {
            **{f"self_attn.{name}_proj": ("read", "input_layernorm") for name in "qkv"},
            "self_attn.o_proj": ("write", "post_attention_layernorm"),
            "mlp.gate_proj": ("read", "pre_feedforward_layernorm"),
            "mlp.up_proj": ("read", "pre_feedforward_layernorm"),
            "mlp.down_proj": ("write", "post_feedforward_layernorm"),
        },
    ),
    "gpt2": (
        "transformer.h",
        {
            "attn.c_attn": ("read", "ln_1"),
            "attn.c_proj": ("write", None),
            "mlp.c_fc": ("read", "ln_2"),
            "mlp.c_proj": ("write", None),
        },
    ),
    "phi3": (
        "model.layers",
        {
            "self_attn.qkv_proj": ("read", "input_layernorm"),
            "self_attn.o_proj": ("write", None),
            "mlp.gate_up_proj": ("read", "post_attention_layernorm"),
            "mlp.down_proj": ("write", None),
        },
    ),
    "opt": (
        "model.decoder.layers",
        {
            **{f"self_attn.{name}_proj": ("read", "self_attn_layer_norm") for name in "qkv"},
            "self_attn.out_proj": ("write", None),
            "fc1": ("read", "final_layer_norm"),
            "fc2": ("write", None),
        },
    ),
}


@torch.no_grad()
def met(family, model, name, directions):
    """Side of a module, and rows [n, width] along which it meets directions [n, d_model]."""
    blocks, roles = ROLES[family]
    block, path = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", name).groups()
    side, norm = roles[path]
    rows = directions.double()
    if norm is None:
        return side, rows
    gain, centres = gain_of(model.get_submodule(f"{blocks}.{block}.{norm}"), rows.shape[1])
    if side == "read":  # d -> g * (d - mean d)
        rows = rows - rows.mean(1, keepdim=True) if centres else rows
        return side, rows * gain
    rows = rows * gain
    return side, rows - rows.mean(1, keepdim=True) if centres else rows


def oracle(matrix, side, rows, factors):
    """The least change of dW, in the Frobenius norm, that makes it `factors` times what it is along each row."""
    if side == "write":
        return oracle(matrix.T, "read", rows, factors).T
    # min |X|^2 with (dW + X) V^T = dW V^T diag(c): X = dW V^T diag(c - 1) pinv(V^T)
    wanted = matrix @ rows.T * (factors - 1)
    return matrix + torch.linalg.lstsq(rows, wanted.T, driver="gelsd").solution.T


def projection(rows):
    """The projector on the span of rows, [width, width]."""
    left, values, _ = torch.linalg.svd(rows.T, full_matrices=False)
    kept = left[:, values > 1e-10 * values[0]]
    return kept @ kept.T


@torch.no_grad()
def with_updates(model, found):
    """The model with dense updates added to its weights, float64."""
    model = model.double()
    for name, matrix in found.items():
        module = model.get_submodule(name)
        module.weight += matrix.T if isinstance(module, Conv1D) else matrix
    return model.eval()
