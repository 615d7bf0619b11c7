"""What every process of the tests runs: `torchrun --nproc_per_node 2 -m tests.distributed.worker OUTPUT WAY...`.

Each way of training leaves the adapter it saved in a folder of its own, or its error. So one launch serves many tests.
"""

import os
import sys
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_sae import SaeSubspaceConfig
from peft_sae.training import train_adapter
from peft_sae.training.checkpoints import last_checkpoint
from tests.tiny import make_model, make_subspace, make_tokenizer

PROCESSES = 2
IDS = torch.randint(4, 16, (4, 9), generator=torch.Generator().manual_seed(0))
TEXTS = ["red green", "sun moon sea", "blue sun", "moon"]  # as many as rows
STEPS, RATE = 3, 0.3
KINDS = ("lora", "free", "frozen", "protected")


def configure(kind: str) -> PeftConfig:
    """LoRA, or a basis that is free and filled up, or frozen."""
    fields = {"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    if kind == "lora":
        return LoraConfig(r=4, **fields)
    protected = {"blocks.0.hook_resid_post": 2} if kind == "protected" else None
    subspace = make_subspace(make_model(), protected=protected)
    fields |= {"r": "auto", "freeze_basis": True} if kind == "frozen" else {"r": 6}
    return SaeSubspaceConfig(subspace=subspace, **fields)


def adapt(kind: str, model: PreTrainedModel | None = None) -> PeftModel:
    model, config = model or make_model(), configure(kind)
    # Sharding takes each process' own part of what should be the same everywhere: with LoRA's weights that takes a
    # seed; the basis and what fills it up depend on none.
    torch.manual_seed(0 if kind == "lora" else rank())
    return get_peft_model(model, config)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def own_rows() -> torch.Tensor:
    """This process' part of the global batch."""
    return IDS.chunk(PROCESSES)[rank()] if dist.is_initialized() else IDS


def make_optimizer(model) -> torch.optim.Optimizer:
    return torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=RATE)


def train(model, optimizer=None, backward=torch.Tensor.backward) -> None:
    optimizer = optimizer or make_optimizer(model)
    for _ in range(STEPS):
        backward(model(own_rows(), labels=own_rows()).loss)
        optimizer.step()
        optimizer.zero_grad()


def save(model: PeftModel, output: Path, state=None) -> None:
    if rank() == 0:
        model.save_pretrained(output, state_dict=state)


def run_loop(kind: str, output: Path) -> None:
    """One process without any wrapper, or DDP."""
    model = adapt(kind)
    train(DistributedDataParallel(model) if dist.is_initialized() else model)
    save(model, output)


def run_fsdp2(kind: str, output: Path) -> None:
    model = adapt(kind)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    train(model)
    save(model, output, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))


def run_fsdp1(kind: str, output: Path, *, policy=None, use_orig_params: bool) -> None:
    model = adapt(kind)
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy or fsdp_auto_wrap_policy(model),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    train(wrapped)
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
        state = wrapped.state_dict()
    # PEFT 0.21 finds no adapter inside submodules that FSDP1 has wrapped, and would save nothing.
    whole = adapt(kind)
    whole.load_state_dict(state)
    save(whole, output)


def run_accelerate(kind: str, output: Path, *, efficient_loading: bool) -> None:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=efficient_loading
    )
    accelerator = sharding_accelerator(plugin)
    model = adapt(kind, without_weights(make_model()) if efficient_loading and rank() else make_model())
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    if efficient_loading:  # accelerate tells an optimizer's weights by their addresses, of which these had none
        optimizer = make_optimizer(model)
    assert isinstance(model, FSDPModule)
    train(model, optimizer, accelerator.backward)
    save(model, output, accelerator.get_state_dict(model))


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is in all processes but the first where only that one loads the weights."""
    for name, weight in list(model.named_parameters()):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, torch.nn.Parameter(weight.to("meta")))
    return model


def sharding_accelerator(plugin) -> Accelerator:
    """Accelerate shards on accelerators only: on CPUs it takes DDP instead, without a word. So it is overruled here."""
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def run_zero3(kind: str, output: Path) -> None:
    """DeepSpeed leaves weights of size 0 in the modules, and gathers them on request."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": len(own_rows()),
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1e9,  # by default it clips at 1
    }
    if rank() == 0:
        make_model().save_pretrained(output / "base")
    dist.barrier()
    partitioning = HfDeepSpeedConfig(settings)
    base = AutoModelForCausalLM.from_pretrained(output / "base")
    assert base.model.norm.weight.numel() == 0
    model = adapt(kind, base)
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=settings)
    for _ in range(STEPS):
        engine.backward(engine(own_rows(), labels=own_rows()).loss)
        engine.step()
    save(model, output, engine._zero3_consolidated_16bit_state_dict())
    del partitioning  # transformers partitions for as long as it lives


def run_trainer(kind: str, output: Path, **arguments) -> None:
    args = TrainingArguments(
        str(output / "trainer"),
        use_cpu=True,
        ddp_backend="gloo" if dist.is_initialized() else None,
        per_device_train_batch_size=len(own_rows()),
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **arguments,
    )
    if args.fsdp:
        sharding_accelerator(FullyShardedDataParallelPlugin(**args.fsdp_plugin_args))
    trainer = Trainer(adapt(kind), args, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) is (dist.is_initialized() and not args.fsdp)
    assert isinstance(trainer.model_wrapped, FSDPModule) is bool(args.fsdp)
    trainer.save_model(str(output))


def run_job(kind: str, output: Path, *, sharded: bool = False) -> None:
    """`train_adapter`; as `accelerate config` sets FSDP2 up, it would save shards."""
    if sharded:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        assert "SHARDED" in str(plugin.state_dict_type)
        sharding_accelerator(plugin)
    settings = {"max_steps": STEPS, "learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "sgd"}
    settings |= {"use_cpu": True, "save_steps": 1, "gradient_checkpointing": False}
    train_adapter(
        *(make_model(), make_tokenizer(), TEXTS, configure(kind), output),
        per_device_train_batch_size=len(own_rows()),
        progress=False,
        **settings,
    )
    assert last_checkpoint(f"{output}.checkpoints").name == f"checkpoint-{STEPS}"


# PEFT's policy wraps what is trained for itself; whole blocks hold trained and frozen weights.
BLOCKS = ModuleWrapPolicy({LlamaDecoderLayer})
WAYS = {
    "ddp": run_loop,
    "fsdp2": run_fsdp2,
    "fsdp2-accelerate": partial(run_accelerate, efficient_loading=False),
    "fsdp2-accelerate-meta": partial(run_accelerate, efficient_loading=True),
    "fsdp1-original": partial(run_fsdp1, use_orig_params=True),
    "fsdp1-flat": partial(run_fsdp1, use_orig_params=False),
    "fsdp1-blocks-original": partial(run_fsdp1, policy=BLOCKS, use_orig_params=True),
    "fsdp1-blocks-flat": partial(run_fsdp1, policy=BLOCKS, use_orig_params=False),
    "ddp-trainer": run_trainer,
    "fsdp2-trainer": partial(run_trainer, fsdp=True),
    "ddp-job": run_job,
    "fsdp2-job": partial(run_job, sharded=True),
    "zero3": run_zero3,
}


def kinds(way: str) -> tuple[str, ...]:
    """Protected directions are measured behind the norms, whose weights not every process has on the meta device."""
    return KINDS[:3] if way == "fsdp2-accelerate-meta" or "job" in way else KINDS


def main(output: Path, ways: list[str]) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    assert dist.get_world_size() == PROCESSES
    environment = dict(os.environ)
    for way in ways:
        for kind in kinds(way):
            folder = output / way / kind
            folder.mkdir(parents=True, exist_ok=True)
            dist.barrier()
            try:
                WAYS[way](kind, folder)
            except Exception:
                (folder / f"error-{rank()}.txt").write_text(traceback.format_exc())
            # Accelerate remembers how it was set up in both.
            os.environ.clear()
            os.environ.update(environment)
            AcceleratorState._reset_state(reset_partial_state=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
