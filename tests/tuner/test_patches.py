"""What is changed in PEFT and transformers: only where the line stands that it answers, and only for our type."""

import functools
import importlib
import inspect

import pytest
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftType, get_peft_model
from peft.tuners.lora import intruders
from peft.utils import hotswap

from peft_sae import SaeSubspaceConfig
from peft_sae.errors import ConfigError, UnsupportedPeftError
from peft_sae.tuner import patches
from peft_sae.tuner.patches import Patch, apply_patches
from peft_sae.tuner.registration import missing_guards, viewed_as_lora
from tests.tiny import make_model, make_subspace


def test_every_line_stands_in_the_installed_versions():
    assert apply_patches() == []


def test_applying_again_wraps_the_function_and_not_the_wrapper():
    first = intruders.reduce_intruder_dimension
    original = first.__peft_sae_original__
    apply_patches()
    again = intruders.reduce_intruder_dimension
    assert again is not first
    assert again.__peft_sae_original__ is original
    assert not hasattr(original, "__peft_sae_original__")


@pytest.mark.parametrize(
    ("module", "name", "line"),
    [
        ("peft.utils.hotswap", "hotswap_adapter", "a line that PEFT does not have"),
        ("peft.utils.hotswap", "no_such_function", "def"),
        ("peft.peft_model", "PeftModel.no_such_method", "def"),
        ("peft.peft_model", "NoSuchClass.method", "def"),
    ],
)
def test_a_version_without_the_line_is_left_alone(module, name, line):
    before = hotswap.hotswap_adapter
    assert not patches._apply(Patch(module, name, line, lambda original: None))
    assert hotswap.hotswap_adapter is before


def test_a_line_that_has_gone_is_told(monkeypatch, caplog):
    gone = Patch("peft.peft_model", "PeftModel.add_adapter", "no such line", lambda original: None)
    monkeypatch.setattr(patches, "PATCHES", (gone,))
    with caplog.at_level("WARNING"):
        assert apply_patches() == [gone]
    assert "PeftModel.add_adapter" in caplog.text
    assert not missing_guards


def test_without_a_guard_nothing_is_protected_by_halves(monkeypatch):
    model = make_model()
    subspace = make_subspace(model, protected={"blocks.0.hook_resid_post": 1})
    guard = Patch("peft.utils.hotswap", "hotswap_adapter", "no such line", lambda original: None, guards=True)
    monkeypatch.setattr(patches, "PATCHES", (guard,))
    apply_patches()
    try:
        config = SaeSubspaceConfig(subspace=subspace, r=2, target_modules=["q_proj"])
        with pytest.raises(UnsupportedPeftError, match=r"hotswap_adapter.*go around the protection"):
            get_peft_model(model, config)
    finally:
        missing_guards.clear()


def test_the_view_as_lora_ends_with_the_call():
    ours, other = SaeSubspaceConfig(subspace=make_subspace(make_model())), LoHaConfig()
    seen = []

    @viewed_as_lora(ours, other)
    def fail():
        seen.extend([ours.peft_type, other.peft_type])
        raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail()
    assert seen == [PeftType.LORA, PeftType.LOHA]
    assert ours.peft_type == PeftType.SAE_SUBSPACE


def test_other_types_still_do_not_mix():
    model = make_model()
    adapted = get_peft_model(model, SaeSubspaceConfig(subspace=make_subspace(model), r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        adapted.add_adapter("loha", LoHaConfig(target_modules=["q_proj"]))
    plain = get_peft_model(make_model(), LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        plain.add_adapter("ours", SaeSubspaceConfig(subspace=make_subspace(make_model()), target_modules=["q_proj"]))


def test_a_failed_addition_leaves_the_lora_model_as_it_was():
    adapted = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    kind = type(adapted.base_model)
    config = SaeSubspaceConfig(subspace=make_subspace(make_model()), r=99, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="r=99 exceeds"):
        adapted.add_adapter("ours", config)
    assert type(adapted.base_model) is kind
    assert adapted.peft_type == PeftType.LORA
    assert set(adapted.peft_config) == {"default"}


def test_configurations_of_other_types_are_read_as_before(tmp_path):
    LoraConfig(r=3).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert type(config) is LoraConfig
    assert config.r == 3


def test_every_wrapper_takes_the_names_that_the_function_takes(tmp_path):
    LoraConfig(r=3).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(pretrained_model_name_or_path=str(tmp_path)).r == 3
    for patch in patches.PATCHES:
        holder = importlib.import_module(patch.module)
        *owner, name = patch.name.split(".")
        for part in owner:
            holder = getattr(holder, part)
        taken = inspect.signature(getattr(holder, name), follow_wrapped=False).parameters
        asked = inspect.signature(getattr(holder, name)).parameters
        flexible = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        assert flexible or set(asked) <= set(taken), patch.name
        named = {key for key, parameter in taken.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}
        assert named <= set(asked) | {"self", "cls"}, patch.name


def test_a_function_that_was_imported_before_is_guarded_too():
    """What user code has bound keeps pointing at PEFT's function; the guard sits in what that function calls."""
    model = make_model()
    subspace = make_subspace(model, protected={"blocks.0.hook_resid_post": 1})
    adapted = get_peft_model(model, SaeSubspaceConfig(subspace=subspace, r=2, target_modules=["q_proj"]))
    unpatched = inspect.unwrap(hotswap.prepare_model_for_compiled_hotswap)
    with pytest.raises(ConfigError, match="being trained with protected features"):
        unpatched(adapted, target_rank=8)


def test_without_source_a_patch_is_told_as_missing(monkeypatch):
    def no_source(_):
        raise OSError("could not get source code")

    monkeypatch.setattr(patches.inspect, "getsource", no_source)
    assert not patches._apply(patches.PATCHES[0])


def test_another_packages_wrapper_around_ours_stays():
    ours = hotswap.check_hotswap_configs_compatible

    @functools.wraps(ours)
    def theirs(*args):
        return ours(*args)

    try:
        hotswap.check_hotswap_configs_compatible = theirs
        patch = next(p for p in patches.PATCHES if p.name == "check_hotswap_configs_compatible")
        patches._apply(patch)
        assert hotswap.check_hotswap_configs_compatible.__peft_sae_original__ is theirs
    finally:
        hotswap.check_hotswap_configs_compatible = ours
