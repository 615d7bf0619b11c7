"""The whole way on a GPU: each stage gives there what it gives on the CPU. Skipped where there is no CUDA device."""

import copy

import pandas
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_sae import (
    Measures,
    SaeSubspaceConfig,
    SubspaceCallback,
    build_subspace,
    collect_statistics,
    edit_adapter,
    export_lora,
    inspect_adapter,
    load_saes,
)
from peft_sae.jobs import TrainingJob, run_job
from peft_sae.statistics.gradient import log_likelihood
from tests.jobs.conftest import SELECT
from tests.tiny import ALIGNED, UNALIGNED, make_model, make_sae, make_subspace, make_tokenizer, write_world

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
HOOKS = {"blocks.0.hook_resid_post": 3, "blocks.1.hook_resid_post": 2}
IDS = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))
DATA = {"aligned": ALIGNED, "unaligned": UNALIGNED}
KINDS = ({}, {"freeze_basis": True}, {"protected": {"blocks.0.hook_resid_post": 2}})
FAMILIES = ("llama", "gemma2", "gpt2", "opt")


def config_for(model, **fields):
    subspace = make_subspace(model, HOOKS, protected=fields.pop("protected", None))
    transposed = model.config.model_type == "gpt2"
    settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "fan_in_fan_out": transposed}
    return SaeSubspaceConfig(subspace=subspace, task_type="CAUSAL_LM", **settings, **fields)


def adapt(family, device, **fields):
    torch.manual_seed(0)
    model = make_model(family)
    return get_peft_model(model.to(device), config_for(model, **fields))


def same_adapter(first, second):
    """Give the second model the first one's parameters."""
    second.load_state_dict({name: value.to(second.device) for name, value in first.state_dict().items()})


def train(model, steps=5, dtype=None):
    ids = IDS.to(model.device)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.float().cpu()


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("measures", [Measures(), Measures(True, True, top_examples=2, sample=4)], ids=["few", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_cpu(family, measures, kind):
    tokenizer = make_tokenizer()
    found = {}
    for device in ("cpu", DEVICE):
        saes = [make_sae(f"blocks.{block}.hook_resid_post", seed=block, kind=kind).to(device) for block in (0, 1)]
        model = make_model(family).to(device)
        found[device] = collect_statistics(model, tokenizer, DATA, saes, measures=measures, progress=False)
    for label in DATA:
        for here, there in zip(found["cpu"].of(label), found[DEVICE].of(label), strict=True):
            assert there.count == here.count
            torch.testing.assert_close(there.mean.cpu(), here.mean.cpu(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(there.variance.cpu(), here.variance.cpu(), rtol=1e-4, atol=1e-5)


def test_attributions_are_those_of_the_cpu():
    found = {}
    for device in ("cpu", DEVICE):
        saes = [make_sae().to(device)]
        model = make_model().to(device)
        settings = {"attribute": log_likelihood, "tokens": "response", "progress": False}
        found[device] = collect_statistics(model, make_tokenizer(), DATA, saes, **settings)
    (here,), (there,) = (found[device].of("aligned") for device in ("cpu", DEVICE))
    torch.testing.assert_close(there.mean.cpu(), here.mean.cpu(), rtol=1e-3, atol=1e-5)


def test_sae_on_another_device_than_the_model_is_taken_along():
    saes = load_saes([make_sae()])
    model, tokenizer = make_model().to(DEVICE), make_tokenizer()
    choice = {"aligned": ALIGNED, "unaligned": UNALIGNED, "top_k": 6, "progress": False}
    there = build_subspace(model, tokenizer, saes=saes, **choice)
    here = build_subspace(model.cpu(), tokenizer, saes=load_saes([make_sae()]), **choice)
    assert there.sites[0].features.tolist() == here.sites[0].features.tolist()
    torch.testing.assert_close(there.sites[0].basis, here.sites[0].basis, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{}, {"freeze_basis": True}, {"protected": {"blocks.0.hook_resid_post": 2}}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_follows_the_cpu(family, fields):
    here, there = adapt(family, "cpu", **fields), adapt(family, DEVICE, **fields)
    same_adapter(here, there)
    assert train(there) == pytest.approx(train(here), rel=1e-3)
    torch.testing.assert_close(logits(there), logits(here), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "fields", [{}, {"freeze_basis": True}, {"protected": {"blocks.0.hook_resid_post": 2}}], ids=str
)
def test_half_precision_learns(fields, dtype):
    torch.manual_seed(0)
    model = make_model().to(DEVICE, dtype)
    adapted = get_peft_model(model, config_for(model, **fields))
    losses = train(adapted, steps=20, dtype=dtype)
    assert all(parameter.dtype == torch.float32 for parameter in adapted.parameters() if parameter.requires_grad)
    assert losses[-1] < losses[0]


def test_adapter_learns_what_loras_learn_at_the_same_pace():
    losses = {}
    for config_cls in (LoraConfig, SaeSubspaceConfig):
        torch.manual_seed(0)
        model = make_model()
        config = config_for(model)
        if config_cls is LoraConfig:
            config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        losses[config_cls] = train(get_peft_model(model.to(DEVICE), config), steps=60)
    assert losses[SaeSubspaceConfig][-1] < (losses[LoraConfig][0] + losses[LoraConfig][-1]) / 2


def test_saved_on_a_gpu_is_the_same_everywhere(tmp_path):
    adapted = adapt("llama", DEVICE, protected={"blocks.0.hook_resid_post": 2})
    train(adapted)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    for device in ("cpu", DEVICE):
        for name in ("adapter", "lora"):
            loaded = PeftModel.from_pretrained(make_model().to(device), tmp_path / name)
            torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-3, atol=1e-3)


def test_adapters_can_be_switched_mixed_and_disabled():
    adapted = adapt("llama", DEVICE)
    base = logits(make_model())
    train(adapted)
    torch.manual_seed(1)
    adapted.add_adapter("second", config_for(make_model(), freeze_basis=True))
    adapted.set_adapter("second")
    train(adapted)
    second = logits(adapted)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), base, rtol=1e-3, atol=1e-3)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), second, rtol=1e-3, atol=1e-3)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(adapted), second, rtol=1e-3, atol=1e-3)


def test_inspection_of_a_model_on_a_gpu_equals_that_on_the_cpu():
    adapted = adapt("llama", DEVICE)
    train(adapted)
    there, here = inspect_adapter(adapted), inspect_adapter(copy.deepcopy(adapted).cpu())
    for name in ("modules", "features"):
        pandas.testing.assert_frame_equal(getattr(there, name), getattr(here, name), rtol=1e-3, atol=1e-5)


def test_edit_of_an_adapter_that_was_trained_on_a_gpu(tmp_path):
    adapted = adapt("llama", DEVICE)
    train(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    edit_adapter(tmp_path / "adapter", tmp_path / "edited", remove=["0:1"], model=make_model())
    edited = PeftModel.from_pretrained(make_model().to(DEVICE), tmp_path / "edited")
    assert not torch.allclose(logits(edited), logits(adapted), atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_compiled_model_gives_the_same():
    adapted = adapt("llama", DEVICE, protected={"blocks.0.hook_resid_post": 2})
    train(adapted)
    expected = logits(adapted)
    compiled = torch.compile(adapted)
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-3, atol=1e-3)


def test_callback_writes_its_measures(tmp_path):
    adapted = adapt("llama", DEVICE)
    data = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS])
    settings = {"max_steps": 4, "report_to": [], "disable_tqdm": True, "logging_steps": 2, "save_strategy": "no"}
    trainer = Trainer(adapted, TrainingArguments(tmp_path, bf16=True, **settings), train_dataset=data)
    trainer.add_callback(SubspaceCallback(trainer, every=2))
    trainer.train()
    norms = [entry["subspace/norm"] for entry in trainer.state.log_history if "subspace/norm" in entry]
    assert norms[-1] > norms[0]


def test_job_runs_on_the_gpu(tmp_path, monkeypatch):
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    training = {"max_steps": 4, "learning_rate": 0.05, "per_device_train_batch_size": 2, "bf16": True}
    adapter = {"r": 4, "target_modules": ["q_proj", "o_proj"]}
    before = torch.cuda.max_memory_allocated()
    job = TrainingJob(
        "base", "aligned.jsonl", "adapter", adapter=adapter, training=training, select=SELECT, merged="merged"
    )
    result = run_job(job, progress=False)
    assert torch.cuda.max_memory_allocated() > before
    adapted = PeftModel.from_pretrained(make_model().to(DEVICE), result.adapter)
    merged = AutoModelForCausalLM.from_pretrained("merged").to(DEVICE)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-3, atol=1e-3)
