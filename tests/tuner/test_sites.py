from types import SimpleNamespace

import pytest

from peft_sae.layout import ModuleRole, Site
from peft_sae.tuner.sites import nearest_site, own_sites, sites_of_role

Q = ModuleRole("read", "resid_pre")
GATE = ModuleRole("read", "resid_mid")
O = ModuleRole("write", "resid_mid")  # noqa: E741
DOWN = ModuleRole("write", "resid_post")
Z = ModuleRole("read", "z")
MLP_IN = ModuleRole("read", "mlp_in")


def site(hook_name):
    return SimpleNamespace(sae=SimpleNamespace(hook_name=hook_name, site=Site.from_hook_name(hook_name)))


def names(sites):
    return [entry.sae.hook_name for entry in sites]


@pytest.mark.parametrize(
    ("role", "block", "hooks", "expected"),
    [
        # resid_post of block 4 is the very tensor that block 5 reads
        (Q, 5, ["blocks.4.hook_resid_post", "blocks.5.hook_resid_post"], "blocks.4.hook_resid_post"),
        (Q, 5, ["blocks.4.hook_resid_mid", "blocks.5.hook_resid_pre"], "blocks.5.hook_resid_pre"),
        (GATE, 5, ["blocks.4.hook_resid_post", "blocks.5.hook_resid_mid"], "blocks.5.hook_resid_mid"),
        # equally far: a reader sees what came before, a writer what comes after
        (GATE, 5, ["blocks.5.hook_resid_post", "blocks.5.hook_resid_pre"], "blocks.5.hook_resid_pre"),
        (O, 5, ["blocks.5.hook_resid_pre", "blocks.5.hook_resid_post"], "blocks.5.hook_resid_post"),
        (DOWN, 5, ["blocks.5.hook_resid_mid", "blocks.6.hook_resid_mid"], "blocks.6.hook_resid_mid"),
        (DOWN, 0, ["blocks.9.hook_resid_post", "blocks.7.hook_resid_post"], "blocks.7.hook_resid_post"),
        (O, 3, ["blocks.3.hook_attn_out", "blocks.3.hook_resid_post"], "blocks.3.hook_attn_out"),
    ],
)
def test_nearest_site(role, block, hooks, expected):
    assert nearest_site([site(hook) for hook in hooks], role, block).sae.hook_name == expected


@pytest.mark.parametrize(
    ("role", "block", "hook", "own"),
    [
        (Q, 5, "blocks.4.hook_resid_post", True),
        (Q, 5, "blocks.5.hook_resid_pre", True),
        (Q, 5, "blocks.5.hook_resid_mid", False),  # comes after attention has read
        (Q, 5, "blocks.5.hook_resid_post", False),
        (GATE, 5, "blocks.5.hook_resid_pre", True),
        (GATE, 5, "blocks.5.hook_resid_post", False),
        (O, 5, "blocks.5.hook_resid_post", True),
        (O, 5, "blocks.4.hook_resid_post", False),
        (DOWN, 5, "blocks.5.hook_resid_post", True),
        (DOWN, 5, "blocks.6.hook_resid_pre", True),
        (DOWN, 5, "blocks.5.hook_resid_mid", False),
    ],
)
def test_own_sites_are_those_the_module_touches(role, block, hook, own):
    assert bool(own_sites([site(hook)], role, block)) is own


def test_directions_are_used_only_in_the_space_they_live_in():
    sites = [site(f"blocks.3.hook_{kind}") for kind in ("resid_post", "attn_out", "mlp_out")]
    heads = [site("blocks.3.attn.hook_z"), site("blocks.4.attn.hook_z")]

    assert names(sites_of_role([*sites, *heads], Q, 3)) == ["blocks.3.hook_resid_post"]
    assert names(sites_of_role([*sites, *heads], O, 3)) == names(sites)
    assert names(sites_of_role([*sites, *heads], Z, 3)) == ["blocks.3.attn.hook_z"]


def test_the_mlps_input_is_a_space_of_its_own_in_every_block():
    sites = [site(name) for name in ("blocks.3.hook_resid_mid", "blocks.3.mlp.hook_in", "blocks.4.mlp.hook_in")]

    assert names(sites_of_role(sites, MLP_IN, 3)) == ["blocks.3.mlp.hook_in"]
    assert names(own_sites(sites_of_role(sites, MLP_IN, 4), MLP_IN, 4)) == ["blocks.4.mlp.hook_in"]
    assert sites_of_role(sites, MLP_IN, 5) == []
    assert names(sites_of_role(sites, GATE, 3)) == names(sites_of_role(sites, O, 3)) == ["blocks.3.hook_resid_mid"]
