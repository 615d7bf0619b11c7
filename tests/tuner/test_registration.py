import importlib
import pickle
import subprocess
import sys

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_sae
from peft_sae.errors import UnsupportedPeftError
from peft_sae.tuner import registration


def test_the_type_is_a_full_member_of_the_enum():
    member = PeftType.SAE_SUBSPACE

    assert PeftType("SAE_SUBSPACE") is member
    assert PeftType["SAE_SUBSPACE"] is member
    assert list(PeftType)[-1] is member
    assert len(set(PeftType)) == len(PeftType)
    assert pickle.loads(pickle.dumps(member)) is member
    assert member == "SAE_SUBSPACE"
    assert member.name == member.value == "SAE_SUBSPACE"


def test_peft_maps_the_type_to_our_classes():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SAE_SUBSPACE] is peft_sae.SaeSubspaceConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SAE_SUBSPACE] is peft_sae.SaeSubspaceModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SAE_SUBSPACE] == "lora_"


def test_registering_again_changes_nothing():
    before = list(PeftType)

    registration.register_name()
    registration.register_classes(peft_sae.SaeSubspaceConfig, peft_sae.SaeSubspaceModel)
    importlib.reload(peft_sae)

    assert list(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SAE_SUBSPACE] is peft_sae.SaeSubspaceConfig


def test_importing_the_package_anew_maps_the_new_classes():
    code = (
        "import sys, peft_sae; old = peft_sae.SaeSubspaceConfig\n"
        "for name in [n for n in sys.modules if n.startswith('peft_sae')]: del sys.modules[name]\n"
        "import peft_sae; from peft import get_peft_config\n"
        "assert peft_sae.SaeSubspaceConfig is not old\n"
        "assert type(get_peft_config({'peft_type': 'SAE_SUBSPACE'})) is peft_sae.SaeSubspaceConfig\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_old_peft_is_refused_with_both_versions(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.9.0")

    with pytest.raises(UnsupportedPeftError, match=rf"peft_sae {peft_sae.__version__} needs peft .* and peft 0\.9\.0"):
        registration.check_peft()


def test_a_peft_that_lost_a_mechanism_is_refused_with_both_versions(monkeypatch):
    monkeypatch.delattr("peft.tuners.tuners_utils.BaseTunerLayer.frozen_peft_weight_names")

    with pytest.raises(UnsupportedPeftError, match=rf"peft {peft.__version__} lacks .*peft_sae {peft_sae.__version__}"):
        registration.check_peft()


def test_a_name_taken_by_another_package_is_refused():
    class Foreign(peft_sae.SaeSubspaceConfig):
        pass

    Foreign.__module__ = "another.package"

    with pytest.raises(UnsupportedPeftError, match="already has a type SAE_SUBSPACE"):
        registration.register_classes(Foreign, peft_sae.SaeSubspaceModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SAE_SUBSPACE] is peft_sae.SaeSubspaceConfig
