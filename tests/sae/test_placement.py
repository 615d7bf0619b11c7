"""What is read at a site is compared with hooks on modules that are named here by hand."""

import copy

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from peft_sae import load_saes
from peft_sae.errors import MismatchError
from peft_sae.layout import SITE_KINDS, ModuleRole, Site
from peft_sae.sae.placement import check_placement, find_layout, find_tap
from peft_sae.statistics.capture import capturing
from tests.tiny import FAMILIES, WIDTH, make_classifier, make_model, make_sae

BLOCK = 1
IDS = torch.tensor([[1, 5, 9, 4, 7, 6], [1, 8, 4, 10, 0, 0]])
ATTENTION = (IDS != 0).long()

# Modules of block 1: attention, its output projection, MLP; the modules whose outputs are what attention and MLP
# add to the residual stream; where a block has one, the norm that reads resid_mid.
_LLAMA = ("model.layers.1", "self_attn.o_proj", "self_attn", "mlp", "post_attention_layernorm")
_GEMMA2 = (
    "model.layers.1",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "pre_feedforward_layernorm",
)
MODULES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
    "phi3": _LLAMA,
    "gpt2": ("transformer.h.1", "attn.c_proj", "attn", "mlp", "ln_2"),
    "gpt_neox": ("gpt_neox.layers.1", "attention.dense", "attention", "mlp", None),
    "opt": ("model.decoder.layers.1", "self_attn.out_proj", "self_attn", "fc2", "final_layer_norm"),
    "mixtral": _LLAMA,
    "qwen3_moe": _LLAMA,
}


def _first(value):
    return value[0] if isinstance(value, tuple) else value


def _expected(model, family):
    """Activations by kind from `output_hidden_states` and hooks, each [batch, length, width]."""
    block, projection, attention, mlp, norm = MODULES[family]
    found, handles = {}, []

    def on_output(kind, name):
        module = model.get_submodule(f"{block}.{name}")
        handles.append(module.register_forward_hook(lambda *args: found.update({kind: _first(args[2]).clone()})))

    def on_input(kind, name):
        module = model.get_submodule(f"{block}.{name}")
        handles.append(module.register_forward_pre_hook(lambda *args: found.update({kind: args[1][0].clone()})))

    on_input("z", projection)
    on_input("mlp_in", "fc1" if family == "opt" else "mlp")
    on_output("attn_out", attention)
    on_output("mlp_out", mlp)
    if norm is not None:
        on_input("resid_mid", norm)
    with torch.no_grad():
        hidden = model(input_ids=IDS, attention_mask=ATTENTION, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    found["resid_pre"], found["resid_post"] = hidden[BLOCK], hidden[BLOCK + 1]
    return {kind: tensor.reshape(*IDS.shape, -1) for kind, tensor in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_reads_every_site_as_it_is(family):
    model = make_model(family)
    expected = _expected(model, family)
    kinds = [kind for kind in SITE_KINDS if kind in expected]
    with capturing(model, [find_tap(model, Site(BLOCK, kind)) for kind in kinds]) as capture:
        found = capture.run(IDS, ATTENTION)
    for kind, activations in zip(kinds, found, strict=True):
        assert activations.shape == expected[kind].shape, kind
        assert (activations - expected[kind]).abs().max() <= 1e-6, kind


@pytest.mark.parametrize("family", FAMILIES)
def test_inside_its_norm_the_mlps_input_differs_only_by_the_gain(family):
    model = make_model(family)
    inside, behind = (find_tap(model, Site(BLOCK, kind)) for kind in ("mlp_normalized", "mlp_in"))
    norm = model.get_submodule(inside.module)
    with capturing(model, [inside, behind]) as capture:
        plain, with_gain = capture.run(IDS, ATTENTION)
    assert (plain - with_gain).abs().max() > 0.1
    gain, bias = norm.weight.detach() + family.startswith("gemma"), getattr(norm, "bias", None)
    torch.testing.assert_close(plain * gain + (0 if bias is None else bias), with_gain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_add_up_to_the_residual_stream(family):
    """attn_out and mlp_out are what is added, post-norms included."""
    model = make_model(family)
    kinds = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    with capturing(model, [find_tap(model, Site(BLOCK, kind)) for kind in kinds]) as capture:
        before, attention, mlp, after = capture.run(IDS, ATTENTION)
    torch.testing.assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-4)


def test_tap_is_found_in_a_model_without_its_head(llama):
    tap = find_tap(llama.model, Site(BLOCK, "resid_pre"))
    assert (tap.module, tap.end) == ("layers.1", "input")


def _read(site, norm=None):
    return (ModuleRole("read", site, norm),)


def _mlp_read(site, norm):
    return (ModuleRole("read", site, norm), ModuleRole("read", "mlp_in"))


def _out(site, norm=None):
    return (ModuleRole("write", site, norm), ModuleRole("read", "z"))


def _write(norm=None):
    return (ModuleRole("write", "resid_post", norm),)


_QKV = {f"self_attn.{part}_proj": _read("resid_pre", "input_layernorm") for part in "qkv"}
LAYOUTS = {
    "llama": (
        "model.layers",
        {
            **_QKV,
            "self_attn.o_proj": _out("resid_mid"),
            "mlp.gate_proj": _mlp_read("resid_mid", "post_attention_layernorm"),
            "mlp.up_proj": _mlp_read("resid_mid", "post_attention_layernorm"),
            "mlp.down_proj": _write(),
        },
    ),
    "gemma2": (
        "model.layers",
        {
            **_QKV,
            "self_attn.o_proj": _out("resid_mid", "post_attention_layernorm"),
            "mlp.gate_proj": _mlp_read("resid_mid", "pre_feedforward_layernorm"),
            "mlp.up_proj": _mlp_read("resid_mid", "pre_feedforward_layernorm"),
            "mlp.down_proj": _write("post_feedforward_layernorm"),
        },
    ),
    "phi3": (
        "model.layers",
        {
            "self_attn.qkv_proj": _read("resid_pre", "input_layernorm"),
            "self_attn.o_proj": _out("resid_mid"),
            "mlp.gate_up_proj": _mlp_read("resid_mid", "post_attention_layernorm"),
            "mlp.down_proj": _write(),
        },
    ),
    "gpt2": (
        "transformer.h",
        {
            "attn.c_attn": _read("resid_pre", "ln_1"),
            "attn.c_proj": _out("resid_mid"),
            "mlp.c_fc": _mlp_read("resid_mid", "ln_2"),
            "mlp.c_proj": _write(),
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {
            "attention.query_key_value": _read("resid_pre", "input_layernorm"),
            "attention.dense": _out("resid_post"),
            "mlp.dense_h_to_4h": _mlp_read("resid_pre", "post_attention_layernorm"),
            "mlp.dense_4h_to_h": _write(),
        },
    ),
    "opt": (
        "model.decoder.layers",
        {
            **{f"self_attn.{part}_proj": _read("resid_pre", "self_attn_layer_norm") for part in "qkv"},
            "self_attn.out_proj": _out("resid_mid"),
            "fc1": _mlp_read("resid_mid", "final_layer_norm"),
            "fc2": _write(),
        },
    ),
}
for name in ("mistral", "qwen2", "qwen3", "gemma"):
    LAYOUTS[name] = LAYOUTS["llama"]
LAYOUTS["gemma3"] = LAYOUTS["gemma2"]
for name in ("mixtral", "qwen3_moe"):  # the experts are parameters, which no basis has a place in
    LAYOUTS[name] = ("model.layers", {**_QKV, "self_attn.o_proj": _out("resid_mid")})


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_says_what_each_module_reads_and_writes(family):
    layout = find_layout(make_model(family))
    blocks, roles = LAYOUTS[family]
    assert layout.blocks == blocks
    assert layout.roles == roles


def test_sequential_gpt_neox_has_a_middle():
    config = GPTNeoXConfig(**FAMILIES["gpt_neox"][1], use_parallel_residual=False)
    model = GPTNeoXForCausalLM(config)
    assert find_tap(model, Site(1, "resid_mid")).module == "gpt_neox.layers.1.post_attention_layernorm"
    roles = find_layout(model).roles
    assert roles["attention.dense"][0].site == roles["mlp.dense_h_to_4h"][0].site == "resid_mid"


def test_site_that_an_architecture_lacks_is_an_error_that_lists_the_others():
    with pytest.raises(
        MismatchError, match=r"GPTNeoXForCausalLM has no hook point resid_mid.*'resid_pre', 'resid_post'"
    ):
        find_tap(make_model("gpt_neox"), Site(1, "resid_mid"))


def test_a_norm_whose_gain_cannot_be_left_out_is_refused_where_an_encoder_reads_inside_it():
    model = make_model()
    model.model.layers[1].post_attention_layernorm = torch.nn.Identity()
    with pytest.raises(MismatchError, match=r"post_attention_layernorm'.*gain of a Identity is not known"):
        find_tap(model, Site(1, "mlp_normalized"))
    assert find_tap(model, Site(1, "mlp_in")).module == "model.layers.1.mlp"


def test_norms_after_the_sums_are_refused():
    model = OPTForCausalLM(OPTConfig(**FAMILIES["opt"][1], do_layer_norm_before=False))
    with pytest.raises(MismatchError, match=r"do_layer_norm_before=False.*no residual stream"):
        find_tap(model, Site(1, "resid_pre"))
    with pytest.raises(MismatchError, match="no residual stream"):
        find_layout(model)


def test_architecture_that_transformer_lens_does_not_know_is_an_error():
    class FantasyForCausalLM(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

    config = copy.deepcopy(make_model().config)
    config.model_type, config.architectures = "fantasy", None
    with pytest.raises(MismatchError, match="does not know the architecture FantasyForCausalLM"):
        find_layout(FantasyForCausalLM(config))


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (lambda: make_sae(width=16), "takes activations of width 16, and LlamaForCausalLM has width 32"),
        (lambda: make_sae("blocks.1.attn.hook_z", width=16), "width 16, .* width 32 at blocks.1.attn.hook_z"),
        (
            lambda: make_sae("blocks.3.hook_resid_pre"),
            r"block 3 does not exist: LlamaForCausalLM has 3 blocks \(0 to 2\)",
        ),
        (
            lambda: make_sae("blocks.1.mlp.hook_in", kind="transcoder", out=16, hook_name_out="blocks.1.hook_mlp_out"),
            r"rebuilds activations of width 16, .* width 32 at blocks\.1\.hook_mlp_out",
        ),
        (
            lambda: make_sae("blocks.1.mlp.hook_in", kind="transcoder", width=16, out=WIDTH),
            r"takes activations of width 16, .* width 32 at blocks\.1\.mlp\.hook_in",
        ),
        (lambda: make_sae(model_name="gemma-2-2b"), "trained on 'gemma-2-2b', and the model is .*(llama)"),
    ],
)
def test_saes_that_do_not_belong_to_the_model_are_refused(llama, sae, message):
    with pytest.raises(MismatchError, match=message):
        check_placement(llama, load_saes(sae()))


def test_width_of_the_heads_outputs_need_not_be_the_residual_width():
    model = make_model("qwen3")
    assert model.config.head_dim * model.config.num_attention_heads == WIDTH
    config = copy.deepcopy(model.config)
    config.head_dim = 16
    wide = type(model)(config)
    (tap,) = check_placement(wide, load_saes(make_sae("blocks.1.attn.hook_z", width=64)))
    assert tap.module == "model.layers.1.self_attn.o_proj"
    assert "self_attn.q_proj" in find_layout(wide).roles


@pytest.mark.parametrize(
    ("hook_name", "tap"),
    [
        ("blocks.1.mlp.hook_in", ("model.layers.1.mlp", "input")),
        ("blocks.1.ln2.hook_normalized", ("model.layers.1.pre_feedforward_layernorm", "normalized")),
        ("blocks.1.hook_resid_mid", ("model.layers.1.pre_feedforward_layernorm", "input")),
        ("blocks.1.hook_mlp_in", ("model.layers.1.pre_feedforward_layernorm", "input")),
    ],
)
def test_a_transcoders_tap_is_where_its_encoder_reads(hook_name, tap):
    (handle,) = load_saes(make_sae(hook_name, kind="transcoder"))
    (found,) = check_placement(make_model("gemma2"), [handle])
    assert (found.module, found.end) == tap
    assert handle.identity.site == Site(1, "mlp_out")


def test_name_of_the_model_is_read_from_its_config():
    model, saes = make_model("gemma2"), load_saes(make_sae(model_name="gemma-2-2b"))
    model.config._name_or_path = "google/gemma-2-2b"
    assert len(check_placement(model, saes)) == 1
    model.config._name_or_path = "google/gemma-3-1b"
    with pytest.raises(
        MismatchError, match=r"trained on 'gemma-2-2b', and the model is 'google/gemma-3-1b' \(gemma2\)"
    ):
        check_placement(model, saes)


def test_an_encoder_reads_its_stream_as_it_is_and_writes_it_through_its_norms():
    layout = find_layout(make_classifier())
    assert layout.blocks == "bert.encoder.layer"
    assert layout.roles == {
        **{f"attention.self.{part}": _read("resid_pre") for part in ("query", "key", "value")},
        "attention.output.dense": _out("resid_mid", "attention.output.LayerNorm"),
        "intermediate.dense": _read("resid_mid"),
        "output.dense": _write("output.LayerNorm"),
    }


@pytest.mark.parametrize("kind", ["resid_mid", "attn_out", "mlp_out", "mlp_in", "mlp_normalized"])
def test_sites_between_an_encoders_norms_are_refused(kind):
    with pytest.raises(MismatchError, match=f"norms behind the sums.*{kind}"):
        find_tap(make_classifier(), Site(1, kind))


def test_an_encoders_stream_is_what_its_blocks_pass_on():
    model = make_classifier()
    found = {}
    for kind in ("resid_pre", "resid_post"):
        tap = find_tap(model, Site(1, kind))
        module = model.get_submodule(tap.module)
        if tap.end == "input":
            module.register_forward_pre_hook(lambda *args: found.update(resid_pre=args[1][0]))
        else:
            module.register_forward_hook(lambda *args: found.update(resid_post=_first(args[2])))
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states

    assert torch.equal(found["resid_pre"], hidden[1])
    assert torch.equal(found["resid_post"], hidden[2])
