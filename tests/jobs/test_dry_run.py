"""A dry run tells what the run itself will do; the shipped jobs work without any network."""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model

from peft_sae.errors import ArtifactError, ConfigError, DataError
from peft_sae.jobs import TrainingJob, read_job
from peft_sae.jobs.dry_run import plan_job
from peft_sae.jobs.memory import saved_bytes, state_bytes
from tests.jobs.conftest import SELECT
from tests.tiny import FAMILIES, make_model, make_subspace

CONFIGS = Path(__file__).parents[2] / "configs"

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing[a-z_]*` is deprecated:FutureWarning")

# Parameters of the published checkpoints; shares as in the paper's notes, where the targets are those of the paper.
PUBLISHED = {
    "gemma-2-2b": (2_614_341_888, 0.0024, 52),
    "gemma-2-2b-frozen": (2_614_341_888, 0.0018, 130),
    "gemma-2-9b": (9_241_705_984, 0.0019, 84),
    "llama-3.1-8b": (8_030_261_248, 0.0013, 64),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_jobs_are_planned_offline(name):
    parameters, share, modules = PUBLISHED[name]
    plan = plan_job(read_job(CONFIGS / f"{name}.yaml"))

    assert plan.parameters == parameters
    assert plan.share == pytest.approx(share, abs=5e-5)
    assert len(plan.modules) == modules
    assert {module.side for module in plan.modules} == {"read"}
    assert plan.memory.weights == pytest.approx(2 * parameters, rel=1e-3)
    assert plan.memory.optimizer == 8 * plan.trained
    assert plan.memory.activations is not None
    assert not Path("dry-run").exists()


def job(**changes):
    fields = {"adapter": {"r": 4, "target_modules": "all-linear"}, "select": SELECT, **changes}
    return TrainingJob("base", fields.pop("data", "aligned.jsonl"), "adapter", max_length=16, **fields)


def test_it_equals_what_the_run_injects(world):
    from peft_sae.jobs import run_job

    training = {"max_steps": 1, "per_device_train_batch_size": 2}
    asked = job(training=training, adapter={"r": "auto", "freeze_basis": True, "target_modules": "all-linear"})
    before = plan_job(asked)
    run_job(asked, progress=False)
    after = plan_job(asked)  # the Subspace is there now

    model = get_peft_model(make_model(), asked.adapter_config())
    record = model.active_peft_config.basis_record["modules"]
    assert {module.name: (module.side, module.hook_name) for module in before.modules} == {
        name: (entry["side"], entry["hook_name"]) for name, entry in record.items()
    }
    assert (after.trained, after.total) == model.get_nb_trainable_parameters()
    ranks = {module.name: module.rank for module in before.modules}
    assert all(module.rank <= ranks[module.name] for module in after.modules)
    assert any("at most" in note for note in before.notes)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mixtral", "qwen3_moe")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_count_what_a_real_forward_pass_keeps(family, checkpointing):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from peft_sae import SaeSubspaceConfig

    def adapted():
        model = make_model(family, use_cache=False)
        modules = ["c_attn", "c_proj"] if family == "gpt2" else "all-linear"
        fields = {"fan_in_fan_out": True} if family == "gpt2" else {}
        config = SaeSubspaceConfig(subspace=make_subspace(model), r=4, target_modules=modules, **fields)
        return get_peft_model(model, config).train()

    if family == "opt" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("before transformers 5.23, OPT's forward pass asks for values, which fake tensors do not have")
    ids, padded = torch.zeros(2, 7, dtype=torch.long), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    real = saved_bytes(adapted(), ids, padded, checkpointing=checkpointing)
    model = adapted()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        fake = saved_bytes(
            model, torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 7).long(), checkpointing=checkpointing
        )
    assert fake == real > 0


def test_checkpointing_keeps_less(world):
    whole, again = (
        plan_job(job(training={"gradient_checkpointing": flag})).memory.activations for flag in (False, True)
    )
    assert again < whole


def test_bits_and_optimisers_count(world):
    plain, small = plan_job(job()).memory, plan_job(job(load_in_4bit=True)).memory
    assert small.weights < plain.weights
    assert state_bytes("adamw_torch") == 8
    assert state_bytes("adamw_8bit") == 2
    assert state_bytes("adamw_torch_4bit") == 1
    assert state_bytes("ademamix") == 12
    assert state_bytes("ademamix_8bit") == 3
    assert state_bytes("adafactor") == 0


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"])
def test_state_is_what_the_optimiser_of_transformers_keeps(name, tmp_path):
    arguments = transformers.TrainingArguments(tmp_path, optim=name, use_cpu=True)
    make, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    weight = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = make([weight], **settings)
    weight.sum().backward()
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.numel() > 1]
    assert sum(value.nbytes for value in kept) / weight.numel() == state_bytes(name)


def test_sides_of_reading_and_writing_modules(world):
    sides = {module.name.split(".")[-1]: module.side for module in plan_job(job()).modules}
    assert sides["q_proj"] == sides["up_proj"] == "read"
    assert sides["o_proj"] == sides["down_proj"] == "write"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architecture": {"model_type": "nothing"}}, ConfigError, "makes no configuration"),
        ({"dtype": "float99"}, ConfigError, "none of torch's"),
        ({"select": None, "subspace": "./nowhere"}, ArtifactError, "nowhere"),
        ({"select": {**SELECT, "saes": "no-such-release"}}, ConfigError, "neither a folder nor a release"),
        (
            {"select": {**SELECT, "saes": "gemma-scope-2b-pt-res-canonical", "ids": ["x"]}},
            ConfigError,
            "has no SAEs",
        ),
        ({"adapter": {"r": 999, "target_modules": ["q_proj"]}}, ConfigError, "exceeds"),
    ],
)
def test_what_cannot_be_planned_is_told(world, changes, error, message):
    with pytest.raises(error, match=message):
        plan_job(job(**changes))


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({}, "is filled up."),
        ({"freeze_basis": True}, "will be an error; fill: zeros, or r: auto, avoids it."),
        ({"fill": "error"}, "will be an error; fill: zeros, or r: auto, avoids it."),
        ({"freeze_basis": True, "fill": "zeros"}, "is filled up with zeros."),
    ],
)
def test_it_says_what_becomes_of_a_basis_that_is_too_small(world, fields, what):
    plan = plan_job(job(adapter={"r": 4, "target_modules": ["q_proj"], **fields}))
    assert any(note.endswith(what) for note in plan.notes)


def test_the_command_prints_it_and_writes_nothing(world, command):
    before = sorted(path.name for path in world.iterdir())
    code, out, err = command("train", CONFIGS / "gemma-2-2b.yaml", "--dry-run")
    assert code == 0, err
    shown = " ".join(out.split())
    for text in ("self_attn.q_proj", "read", "10: resid_post", "0.24 %", "base weights", "5.23", "No weights"):
        assert text in shown
    assert sorted(path.name for path in world.iterdir()) == before


@pytest.mark.parametrize("key", ["data", "eval_data", "aligned", "preferences"])
@pytest.mark.parametrize("name", ["empty.jsonl", "nowhere.jsonl"])
def test_data_that_are_files_are_read_through(world, key, name):
    (world / "empty.jsonl").write_text("")
    texts = {"aligned": "aligned.jsonl", "unaligned": "unaligned.jsonl"}
    if key in ("aligned", "preferences"):
        texts = {"preferences": name} if key == "preferences" else {**texts, key: name}
        select = {**{name: value for name, value in SELECT.items() if name not in ("aligned", "unaligned")}, **texts}
        changes = {"select": select}
    else:
        changes = {key: name}
    with pytest.raises(DataError, match=r"is empty, so there is nothing to read|cannot be opened"):
        plan_job(job(**changes))


@pytest.mark.parametrize("fields", [{"target_modules": ["v_prj"]}, {"layers_to_transform": [99]}])
def test_an_adapter_that_fits_nothing_is_told(world, fields):
    with pytest.raises(ConfigError, match=r"PEFT refuses the adapter .*Correct the fields under 'adapter'"):
        plan_job(job(adapter={"r": 4, "target_modules": ["q_proj"], **fields}))
