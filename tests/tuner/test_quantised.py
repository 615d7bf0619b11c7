"""Quantised base models: PEFT's own layer for each, with the basis in it. Every package is optional, as in PEFT."""

from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from peft_sae import SaeSubspaceConfig
from peft_sae.tuner.factors import protected_factors
from tests.tiny import make_model, make_subspace

IDS = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
# In bitsandbytes and HQQ blocks of 64 weights share a scale. Other widths work, but a block then spans rows.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
KINDS = ("lora", "free", "frozen", "protected")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to .-bit linear may get:UserWarning"),
]


def quantise_on_loading(make_config):
    def load(folder):
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=make_config(), device_map="cpu", dtype=torch.float32
        )

    return load


def nf4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def int8():
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def replace_targets(make_layer):
    """For packages whose loading by transformers wants a GPU."""

    def load(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, module in list(model.named_modules()):
            parent, _, last = name.rpartition(".")
            if last in TARGETS:
                setattr(model.get_submodule(parent), last, make_layer(module))
        return model.requires_grad_(False)

    return load


def hqq(linear):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=8, group_size=64)
    return HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")


def aqlm(linear):
    from aqlm import QuantizedLinear

    layer = QuantizedLinear(linear.in_features, linear.out_features, 8, 1, 1, 8, bias=False, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    layer.codes.data.random_(-128, 128, generator=generator)
    layer.codebooks.data.normal_(0, 0.1, generator=generator)
    layer.scales.data.fill_(1)
    return layer


def gptq(linear):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return fill(TorchLinear(4, 32, True, False, linear.in_features, linear.out_features))


def awq(linear):
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    return fill(AwqTorchLinear(4, 32, True, False, linear.in_features, linear.out_features, register_buffers=True))


def fill(layer):
    """Any weights will do."""
    layer.qweight.random_(generator=torch.Generator().manual_seed(0))
    layer.qzeros.fill_(0x77777777)
    layer.scales.fill_(0.02)
    layer.post_init()
    return layer


# AQLM's kernel for CPUs cannot be trained through, so there is no more to see of it than the layer.
LOADERS = {
    "nf4": ("bitsandbytes", "Linear4bit", quantise_on_loading(nf4)),
    "int8": ("bitsandbytes", "Linear8bitLt", quantise_on_loading(int8)),
    "torchao": ("torchao", "TorchaoLoraLinear", quantise_on_loading(torchao)),
    "hqq": ("hqq", "HqqLoraLinear", replace_targets(hqq)),
    "gptq": ("gptqmodel", "GPTQLoraLinear", replace_targets(gptq)),
    "awq": ("gptqmodel", "AwqLoraLinear", replace_targets(awq)),
    "aqlm": ("aqlm", "AqlmLoraLinear", replace_targets(aqlm)),
}


def methods(*left_out):
    installed = [name for name, (package, _, _) in LOADERS.items() if find_spec(package)]
    return pytest.mark.parametrize("method", [name for name in installed if name not in left_out])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    make_model(**SIZES).save_pretrained(path)
    return path


def load(method, folder):
    # In evaluation, bitsandbytes packs 4-bit weights for some CPUs in a way that PEFT cannot unpack. Nothing drops out.
    return LOADERS[method][2](folder).train()


def adapt(model, kind) -> PeftModel:
    fields = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    if kind == "lora":
        return get_peft_model(model, LoraConfig(r=4, **fields))
    protected = {"blocks.0.hook_resid_post": 2} if kind == "protected" else None
    subspace = make_subspace(model, protected=protected)
    config = SaeSubspaceConfig(subspace=subspace, r="auto", freeze_basis=kind == "frozen", **fields)
    return get_peft_model(model, config)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def train(model, steps=2):
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.3)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def layers(model):
    return {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}


def make_unseen(factor):
    """The directions, found as what the product takes out of everything."""
    width = factor.in_features if factor.side == "read" else factor.out_features
    kept = factor.effective(torch.eye(width))
    return torch.linalg.svd(torch.eye(width) - kept).Vh[: factor.count]


def factors(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("kind", KINDS)
@methods()
def test_the_layer_is_pefts_own_and_the_basis_in_it_is_that_of_the_full_model(folder, method, kind):
    adapted = adapt(load(method, folder), kind)

    assert {type(layer).__name__ for layer in layers(adapted).values()} == {LOADERS[method][1]}
    full = factors(adapt(make_model(**SIZES), kind))
    for name, weight in factors(adapted).items():
        assert weight.dtype is torch.float32
        if kind == "lora":  # at random, and where the scales are of half precision rounded to it
            torch.testing.assert_close(weight, full[name], rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(weight, full[name]), name


@pytest.mark.parametrize("kind", KINDS)
@methods("aqlm")
def test_training_saving_and_loading(folder, method, kind, tmp_path):
    base = load(method, folder)
    before = logits(base)

    adapted = adapt(base, kind).train()
    start = factors(adapted)
    assert torch.equal(logits(adapted), before)
    train(adapted)
    trained = logits(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(method, folder), tmp_path).train()

    for name, weight in factors(adapted).items():
        holds_basis = ("lora_A" in name) != any(writer in name for writer in ("o_proj", "down_proj"))
        assert torch.equal(weight, start[name]) is (kind == "frozen" and holds_basis), name
    for _, factor in protected_factors(adapted):
        unseen = make_unseen(factor)
        assert (factor.weight @ unseen.T if factor.side == "read" else unseen @ factor.weight).abs().max() < 1e-6
    assert len(list(protected_factors(adapted))) == (len(layers(adapted)) if kind == "protected" else 0)
    assert not torch.allclose(trained, before, atol=0.1)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    assert torch.equal(logits(loaded), trained)


@pytest.mark.parametrize("kind", KINDS)
@methods("gptq", "awq", "aqlm")
def test_merging_costs_what_quantising_costs(folder, method, kind):
    adapted = adapt(load(method, folder), kind).train()
    before = logits(adapted)
    cost = float((before - logits(make_model(**SIZES))).abs().max())
    train(adapted)
    trained = logits(adapted)
    assert (trained - before).abs().max() > 5 * cost

    # Merging quantises the sum anew, and unmerging the difference, LoRA's no less than ours.
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), trained, rtol=0, atol=2 * cost)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(adapted), trained, rtol=0, atol=2 * cost)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), before, rtol=0, atol=2 * cost)


# PEFT 0.21 calls transformers 5.2x by an old name.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS if find_spec("bitsandbytes") else [])
def test_qlora_as_it_is_usually_set_up(folder, kind):
    """A bfloat16 model in 4 bits, its norms cast up, with gradient checkpointing."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
    )
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False}).train()
    before = logits(base)

    adapted = adapt(base, kind).train()

    assert torch.equal(logits(adapted), before)
    full = factors(adapt(make_model(**SIZES).bfloat16(), kind))
    for name, weight in factors(adapted).items():
        torch.testing.assert_close(weight, full[name], rtol=0, atol=1e-6 if kind != "lora" else 1e-2)
    train(adapted)
    assert not torch.allclose(logits(adapted), before, atol=0.1)
