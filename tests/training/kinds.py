"""Plain LoRA and SAE_SUBSPACE for the same tests, so that a failure of LoRA is told apart from one of ours."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_sae import SaeSubspaceConfig
from tests.tiny import make_model, make_subspace

KINDS = ["lora", "free", "frozen"]
IDS = torch.randint(4, 16, (8, 9), generator=torch.Generator().manual_seed(0))


def make_config(kind, **fields):
    """A configuration for modules that read the stream and modules that write it."""
    fields = {"r": 4, "target_modules": ["q_proj", "o_proj", "down_proj"], "task_type": "CAUSAL_LM", **fields}
    if kind == "lora":
        return LoraConfig(**fields)
    return SaeSubspaceConfig(subspace=make_subspace(make_model()), freeze_basis=kind == "frozen", **fields)


def adapt(kind, model=None, **fields) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model or make_model(), make_config(kind, **fields))


def randomise(model):
    """Give the trainable parameters other values, so that the adapter does something."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def factors(model) -> dict[str, torch.Tensor]:
    """The adapter's weights under the names that they have within the base model."""
    return {
        name.removeprefix("base_model.model."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def is_frozen(kind, name) -> bool:
    return kind == "frozen" and ("lora_A" in name) == ("q_proj" in name)


def assert_trained(kind, model):
    """Frozen factors have the bits that injection wrote, the others have moved, and the base weights are untouched."""
    written, found = factors(adapt(kind)), factors(model)
    assert found.keys() == written.keys()
    assert {name for name in found if torch.equal(found[name], written[name])} == {
        name for name in found if is_frozen(kind, name)
    }
    assert_frozen(kind, model)
    assert_base_untouched(model)


def assert_frozen(kind, model):
    adapter = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert adapter
    assert {name for name in adapter if not adapter[name].requires_grad} == {
        name for name in adapter if is_frozen(kind, name)
    }


def assert_base_untouched(model):
    expected = make_model().state_dict()
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def arguments(cls, folder, **settings):
    """Training arguments for a few silent steps."""
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **settings,
    }
    return cls(str(folder), **settings)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
