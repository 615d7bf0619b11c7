"""What can be a target."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig

from tests.parity.harness import IDS, ability, assert_close, assert_differs, logits, train
from tests.tiny import make_classifier, make_model, make_subspace

NO_BASIS = "no basis is there to freeze"


def check(job, family, tmp_path, **fields):
    """Step 0, training, saving and merging, which is what a target must stand."""
    before = logits(make_model(family))
    adapted = job.adapt(make_model(family), trained=False, **fields)
    assert torch.equal(logits(adapted), before)
    train(adapted)
    after = logits(adapted.eval())
    assert_differs(after, before)
    adapted.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(make_model(family), str(tmp_path))), after)
    assert_close(logits(adapted.merge_and_unload(safe_merge=True)), after)
    return adapted


@ability("Linear targets")
def test_linear(job, tmp_path):
    check(job, "llama", tmp_path)


@ability("All linear layers (`all-linear`)")
def test_all_linear(job, tmp_path):
    check(job, "gemma2", tmp_path, target_modules="all-linear")


@ability("Targets by regular expression")
def test_regular_expression(job, tmp_path):
    check(job, "llama", tmp_path, target_modules=r".*\.1\.self_attn\.(q|o)_proj")


@ability("PEFT's default targets")
def test_default_targets(job, tmp_path):
    check(job, "llama", tmp_path, target_modules=None)


@ability("Conv1D targets (GPT-2)")
def test_conv1d(job, tmp_path):
    check(job, "gpt2", tmp_path, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)


@ability("Fused projections (Phi-3, GPT-NeoX)")
@pytest.mark.parametrize(
    ("family", "targets"),
    [("phi3", ["qkv_proj", "gate_up_proj", "down_proj"]), ("gpt_neox", ["query_key_value", "dense_h_to_4h"])],
)
def test_fused(job, family, targets, tmp_path):
    check(job, family, tmp_path, target_modules=targets)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@ability("Embedding targets", frozen=NO_BASIS)
def test_embedding(job, tmp_path):
    check(job, "llama", tmp_path, target_modules=["embed_tokens", "q_proj"])


class Convolutions(nn.Module):
    """Something that is no language model."""

    def __init__(self):
        super().__init__()
        self.config = LlamaConfig(hidden_size=32, num_hidden_layers=3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(16, 2)

    def forward(self, x):
        return self.out(self.conv(x).flatten(1))


@ability("Conv2d targets", frozen=NO_BASIS)
def test_conv2d(job):
    torch.manual_seed(0)
    model, x = Convolutions(), torch.randn(2, 3, 4, 4)
    before = model(x)
    config = job.config(make_model(), target_modules=["conv"], task_type=None)
    adapted = get_peft_model(model, config)
    assert torch.equal(adapted(x), before)
    adapted(x).square().sum().backward()
    layer = adapted.base_model.model.conv
    assert layer.lora_B["default"].weight.grad.abs().max() > 0
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        after = adapted(x)
        assert_differs(after, before)
        assert_close(adapted.merge_and_unload(safe_merge=True)(x), after)


@ability("MoE experts by `target_parameters`", frozen=NO_BASIS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts(job, family, tmp_path):
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    check(job, family, tmp_path, target_modules=["q_proj"], target_parameters=parameters)


# PEFT enters the fused parameter's rank into the pattern, and does not find it among the modules.
@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
@ability("MoE experts by their names before transformers 5", frozen=NO_BASIS)
def test_experts_by_old_names(job, tmp_path):
    adapted = job.adapt(make_model("mixtral"), target_modules=["q_proj", "w1", "w2", "w3"])
    assert any("experts" in name for name, _ in adapted.named_parameters() if "lora_" in name)
    after = logits(adapted)
    adapted.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(make_model("mixtral"), str(tmp_path))), after)


@ability("A classification head (BERT, `SEQ_CLS`)")
def test_classifier(job, tmp_path):
    def scores(model):
        with torch.no_grad():
            return model(IDS).logits

    before, labels = scores(make_classifier()), torch.tensor([0, 1, 2, 0])
    targets = ["query", "attention.output.dense", "intermediate.dense"]
    model = make_classifier()
    adapted = get_peft_model(model, job.config(model, target_modules=targets, task_type="SEQ_CLS"))
    assert_close(scores(adapted), before)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = adapted(IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = scores(adapted.eval())
    adapted.save_pretrained(tmp_path)
    assert_close(scores(PeftModel.from_pretrained(make_classifier(), str(tmp_path)).eval()), after)
    assert_close(scores(adapted.merge_and_unload(safe_merge=True)), after)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@ability("Tied embeddings (`ensure_weight_tying`)", frozen=NO_BASIS)
def test_tied_embeddings(job, tmp_path):
    model = make_model("llama", tie_word_embeddings=True)
    before = logits(model)
    fields = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}
    adapted = job.adapt(model, **fields)
    after = logits(adapted)
    assert_differs(after, before)
    embedding, head = adapted.get_base_model().model.embed_tokens, adapted.get_base_model().lm_head
    assert torch.equal(embedding.lora_embedding_A["default"].T, head.lora_B["default"].weight)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model("llama", tie_word_embeddings=True), str(tmp_path))
    assert_close(logits(again), after)


@ability("Mamba's `out_proj` is refused, as PEFT's kernels pass it by")
def test_mamba_guard(job):
    model = make_model()
    model.config.model_type = "mamba"
    model.model.layers[0].self_attn.out_proj = nn.Linear(32, 32)
    config = job.config(model, target_modules=["out_proj"])
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(model, config)


def test_the_subspace_of_the_harness_reaches_readers_and_writers():
    sides = {role[0].side for role in make_subspace(make_model()).layout.roles.values()}
    assert sides == {"read", "write"}


# PEFT enters the fused parameter's rank into the pattern, and does not find it among the modules.
@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
@ability("Loading experts that were trained before transformers 5")
def test_experts_of_an_old_checkpoint(job, tmp_path):
    """The same file under either type: its tensors for single experts become those of the fused parameters."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (32, 48), "w2": (48, 32), "w3": (32, 48)}
    tensors = {}
    for layer in range(3):
        for expert in range(4):
            for name, (inputs, outputs) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
                tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    outputs = {}
    for kind in sorted({"LORA", job.kind.split(",")[0]}):
        folder = tmp_path / kind
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": kind, "r": 2, "lora_alpha": 2, "target_modules": ["w1", "w2", "w3"]}
        (folder / "adapter_config.json").write_text(json.dumps({**config, "inference_mode": True}))
        outputs[kind] = logits(PeftModel.from_pretrained(make_model("mixtral"), str(folder)))
    assert_differs(outputs["LORA"], logits(make_model("mixtral")))
    assert torch.equal(outputs["LORA"], outputs[job.kind.split(",")[0]])
