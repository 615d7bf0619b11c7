import json

import pytest

from peft_sae.errors import ArtifactError, MismatchError
from peft_sae.layout import BlockLayout, ModuleRole, Site

LAYOUT = BlockLayout(
    blocks="model.layers",
    roles={
        "self_attn.q_proj": (ModuleRole("read", "resid_pre", "input_layernorm"),),
        "self_attn.o_proj": (ModuleRole("write", "resid_mid"), ModuleRole("read", "z")),
    },
)


@pytest.mark.parametrize(
    ("hook_name", "block", "kind"),
    [
        ("blocks.12.hook_resid_post", 12, "resid_post"),
        ("blocks.0.hook_resid_mid", 0, "resid_mid"),
        ("blocks.3.attn.hook_z", 3, "z"),
        ("blocks.3.hook_mlp_out", 3, "mlp_out"),
        ("blocks.3.mlp.hook_in", 3, "mlp_in"),
        ("blocks.3.hook_mlp_in", 3, "resid_mid"),  # TransformerLens has it before the norm
    ],
)
def test_hook_name_gives_block_and_kind(hook_name, block, kind):
    assert Site.from_hook_name(hook_name) == Site(block, kind)


@pytest.mark.parametrize("hook_name", ["hook_embed", "blocks.1.ln2.hook_normalized", "blocks.x.hook_resid_pre", ""])
def test_unsupported_hook_name_is_an_error_that_lists_the_sites(hook_name):
    with pytest.raises(MismatchError, match=rf"Hook point {hook_name!r} is not supported.*resid_pre.*Choose SAEs"):
        Site.from_hook_name(hook_name)


def test_an_encoder_may_read_inside_the_norm_too():
    assert Site.from_hook_name("blocks.1.ln2.hook_normalized", encoder=True) == Site(1, "mlp_normalized")
    assert Site.from_hook_name("blocks.1.mlp.hook_in", encoder=True) == Site(1, "mlp_in")
    with pytest.raises(MismatchError, match="is not supported"):
        Site.from_hook_name("blocks.1.ln1.hook_normalized", encoder=True)


def test_half_steps_follow_the_residual_stream():
    kinds = ["resid_pre", "resid_mid", "resid_post"]
    assert [Site(4, kind).half_steps for kind in kinds] == [8, 9, 10]
    assert Site(4, "resid_post").half_steps == Site(5, "resid_pre").half_steps
    assert Site(4, "attn_out").half_steps == Site(4, "resid_mid").half_steps
    assert Site(4, "mlp_out").half_steps == Site(4, "resid_post").half_steps
    assert Site(4, "z").half_steps is None
    assert Site(4, "mlp_in").half_steps is None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.7.self_attn.q_proj", ("model.layers.7", 7, "self_attn.q_proj")),
        ("base_model.model.model.layers.7.mlp.up_proj", ("base_model.model.model.layers.7", 7, "mlp.up_proj")),
        ("layers.7.mlp.up_proj", ("layers.7", 7, "mlp.up_proj")),
        ("model.layers.7.mlp.experts.3.up_proj", ("model.layers.7", 7, "mlp.experts.3.up_proj")),
        ("lm_head", None),
        ("vision_tower.encoder.layers.7.self_attn.q_proj", None),
        ("my_layers.7.q_proj", None),
        ("submodel.layers.7.q_proj", None),
    ],
)
def test_locate_finds_modules_of_blocks_only(name, found):
    assert LAYOUT.locate(name) == found


def test_layout_survives_json():
    assert BlockLayout.from_dict(json.loads(json.dumps(LAYOUT.to_dict()))) == LAYOUT


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("roles"),
        lambda data: data.update(roles=["q_proj"]),
        lambda data: data["roles"]["self_attn.q_proj"][0].update(side="both"),
        lambda data: data["roles"]["self_attn.q_proj"][0].update(site="embed"),
        lambda data: data["roles"]["self_attn.q_proj"][0].pop("norm"),
    ],
)
def test_malformed_layout_is_an_artifact_error(change):
    data = LAYOUT.to_dict()
    change(data)
    with pytest.raises(ArtifactError, match=r"block layout is malformed.*Build the Subspace again"):
        BlockLayout.from_dict(data)
