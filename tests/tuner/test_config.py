import copy
import json
import pickle

import pytest
from peft import LoraConfig, PeftConfig, PeftType, get_peft_config

from peft_sae import SaeSubspaceConfig, Subspace
from peft_sae.errors import ConfigError
from tests.tiny import make_model, make_subspace


@pytest.fixture(scope="module")
def subspace():
    return make_subspace(make_model())


def test_python_route_keeps_every_lora_field():
    lora = LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"], lora_dropout=0.1, use_rslora=True)
    shared = {name: value for name, value in lora.to_dict().items() if name != "peft_type"}

    config = SaeSubspaceConfig(**shared, subspace="somewhere")

    assert config.peft_type is PeftType.SAE_SUBSPACE
    assert {name: config.to_dict()[name] for name in shared} == shared


def test_dict_route():
    config = get_peft_config({"peft_type": "SAE_SUBSPACE", "r": 4, "subspace": "somewhere"})

    assert isinstance(config, SaeSubspaceConfig)
    assert (config.r, config.subspace) == (4, "somewhere")


def test_json_route_turns_a_lora_config_into_ours(tmp_path):
    LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "peft_type": "SAE_SUBSPACE", "subspace": "somewhere"}))

    config = PeftConfig.from_pretrained(str(tmp_path))

    assert isinstance(config, SaeSubspaceConfig)
    assert (config.r, config.subspace, config.target_modules) == (4, "somewhere", {"q_proj"})


def test_a_subspace_object_goes_along_when_the_config_is_saved(tmp_path, subspace):
    SaeSubspaceConfig(subspace=subspace).save_pretrained(str(tmp_path))

    config = SaeSubspaceConfig.from_pretrained(str(tmp_path))

    assert Subspace.from_pretrained(config.subspace).digest == subspace.digest


def test_a_config_with_a_subspace_is_json_and_survives_copies(subspace):
    config = SaeSubspaceConfig(subspace=subspace, r="auto")

    assert json.loads(json.dumps(config.to_dict(), default=str))["subspace"] == "./subspace"
    assert copy.deepcopy(config).subspace.digest == subspace.digest
    assert pickle.loads(pickle.dumps(config)).subspace.digest == subspace.digest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0 is no rank"),
        ({"r": "many"}, "r='many' is no rank"),
        ({"r": 10**9}, "r=1000000000 is no rank. Give an integer from 1 to 65536"),
        ({"rank_pattern": {"q_proj": 2**17}}, "rank_pattern=.* is no mapping of names to integers from 1 to 65536"),
        ({"r": True}, "r=True is no rank"),
        ({"layer_map": "far"}, "layer_map='far' is unknown. Choose one of 'nearest', 'exact'"),
        ({"fill": "ones"}, "fill='ones' is unknown"),
        ({"freeze_basis": "yes"}, "freeze_basis='yes' is neither true nor false"),
        ({"sides": {"q_proj": "up"}}, r"sides\['q_proj'\]='up' is unknown"),
        ({"subspace": 3}, "subspace is a int, from which no basis can be had"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' and subspace both"),
        ({"freeze_basis": True, "bias": "lora_only"}, "freeze_basis=True and bias='lora_only' contradict"),
        ({"freeze_basis": True, "use_dora": True}, "freeze_basis=True and use_dora=True contradict each other"),
        ({"sides": [1]}, r"sides=\[1\] is no mapping"),
        ({"rank_pattern": {"q_proj": "xx"}}, "rank_pattern=.* is no mapping of names to integers from 1 to 65536"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern=.* is no mapping of names to integers from 1 to 65536"),
        ({"layer_replication": [(0, 1)]}, "layer_replication changes which block is which"),
        ({"subspace": None, "freeze_basis": True}, "freeze_basis=True needs a basis"),
        ({"subspace": None, "r": "auto"}, "r='auto' needs a basis"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        SaeSubspaceConfig(**{"subspace": "somewhere", **fields})


ENTRY = {
    "side": "read",
    "hook_name": None,
    "basis": 1,
    "filled": 0,
    "dropped": 0,
    "protected_read": 0,
    "protected_write": 0,
}
RECORD = {"digest": "0", "model": {}, "automatic_r": None, "modules": {"q": ENTRY}}


def test_a_record_as_injection_writes_it_is_accepted():
    assert SaeSubspaceConfig(basis_record=RECORD).basis_record == RECORD


@pytest.mark.parametrize(
    "record",
    [
        [],
        {"digest": "0"},
        {**RECORD, "digest": 0},
        {**RECORD, "model": None},
        {**RECORD, "automatic_r": "8"},
        {**RECORD, "modules": []},
        {**RECORD, "modules": {"q": {}}},
        {**RECORD, "modules": {"q": {**ENTRY, "side": "up"}}},
        {**RECORD, "modules": {"q": {**ENTRY, "hook_name": 3}}},
    ],
)
def test_a_record_that_injection_did_not_write_is_refused(record):
    with pytest.raises(ConfigError, match="basis_record is not what injection writes"):
        SaeSubspaceConfig(basis_record=record)


def test_a_misspelt_field_is_refused_with_a_suggestion_on_every_route(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SAE_SUBSPACE", "freeze_bais": True}))
    message = "no field 'freeze_bais'.*Did you mean 'freeze_basis'"

    with pytest.raises(ConfigError, match=message):
        SaeSubspaceConfig(freeze_bais=True)
    with pytest.raises(ConfigError, match=message):
        get_peft_config({"peft_type": "SAE_SUBSPACE", "freeze_bais": True})
    with pytest.raises(ConfigError, match=message):
        PeftConfig.from_pretrained(str(tmp_path))


def test_fields_of_a_newer_peft_are_dropped_with_pefts_own_warning(tmp_path):
    data = {"peft_type": "SAE_SUBSPACE", "r": 4, "field_of_tomorrow": 1, "peft_version": "99.0"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(data))

    with pytest.warns(UserWarning, match="field_of_tomorrow"):
        config = PeftConfig.from_pretrained(str(tmp_path))

    assert config.r == 4
