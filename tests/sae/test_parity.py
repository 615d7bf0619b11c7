"""Activations that we compute on a plain model are sae-lens' own, for every architecture, place and input scaling.

The streams that sae-lens encodes come from elsewhere: the plain model's own `output_hidden_states` between the blocks,
and inside them sae-lens' HookedSAETransformer, which computes the model by code of its own.
"""

from functools import cache

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata

from peft_sae import load_saes
from peft_sae.errors import MismatchError
from peft_sae.sae.placement import check_placement
from peft_sae.statistics.capture import capturing
from tests.sae.hooked import make_hooked
from tests.tiny import WIDTH, make_model, make_sae

from .blocks import from_blocks, small_blocks

FAMILIES = ["gpt2", "llama", "gemma2"]
IDS = torch.tensor([[1, 5, 9, 4, 7, 6], [1, 8, 4, 10, 12, 11]])
TOLERANCE = 1e-5

PLACES = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "attn.hook_z", "hook_mlp_out"]
PLACES += ["mlp.hook_in"]
TRANSCODER_PLACES = ["mlp.hook_in", "ln2.hook_normalized", "hook_mlp_in", "hook_resid_mid", "hook_resid_pre"]

AUTOENCODERS = ["standard", "gated", "jumprelu", "topk", "abstopk", "matching_pursuit"]
TRANSCODERS = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
REFUSED = ["temporal"]
TRAINED = ["standard", "gated", "jumprelu", "topk", "abstopk", "matching_pursuit"]
SAVED_FIRST = ["batchtopk", "matryoshka_batchtopk"]  # refused as they are, and loaded once saved for inference

SCALINGS = ["none", "constant_norm_rescale", "layer_norm", "expected_average_only_in", "covariance_whitening"]


def test_every_architecture_of_sae_lens_is_tested_here():
    assert sorted(SAE_CLASS_REGISTRY) == sorted(AUTOENCODERS + TRANSCODERS + REFUSED)
    assert sorted(SAE_TRAINING_CLASS_REGISTRY) == sorted(TRAINED + SAVED_FIRST)


@cache
def streams(family):
    """What sae-lens' model has at each hook point, [batch, length, ...], by hook name."""
    model = make_model(family)
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
        found = dict(make_hooked(model).run_with_cache(IDS)[1])
    for block in range(2):  # the last block's is normalised in a plain model
        for kind, tensor in (("resid_pre", hidden[block]), ("resid_post", hidden[block + 1])):
            name = f"blocks.{block}.hook_{kind}"
            assert (tensor - found[name]).abs().max() <= TOLERANCE
            found[name] = tensor
    return found


def encode(model, saes):
    """Our activations, each [batch, length, d_sae]."""
    handles = [load_saes(sae)[0] for sae in saes]
    with capturing(model, check_placement(model, handles)) as capture:
        found = capture.run(IDS, torch.ones_like(IDS))
    return [
        from_blocks(handle, x.flatten(0, 1), 500).unflatten(0, IDS.shape)
        for handle, x in zip(handles, found, strict=True)
    ]


def cases(kind):
    """Input scaling and whether the decoder's bias is taken off the input, as far as an architecture has them."""
    for scaling in SCALINGS:
        if kind == "matching_pursuit" and scaling == "covariance_whitening":  # sae-lens refuses to fold it
            continue
        yield from ((scaling, bias) for bias in ((False,) if kind in TRANSCODERS else (False, True)))


def make(kind, place, scaling, bias):
    """The SAE that is loaded, and how sae-lens encodes a stream with the weights as they were before folding."""
    settings = {"normalize_activations": scaling, "apply_b_dec_to_input": bias}
    if place.endswith("hook_z"):
        settings["reshape_activations"] = "hook_z"
    first, sae = (make_sae(f"blocks.1.{place}", kind=kind, settings=settings) for _ in range(2))
    normal = torch.Generator().manual_seed(3)
    if scaling == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(2.5)
        if kind == "matching_pursuit":  # folding changes what it chooses
            return sae, sae.encode
        return sae, lambda x: first.encode(2.5 * x)
    if scaling == "covariance_whitening":
        mean = torch.randn(WIDTH, generator=normal)
        matrix = torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH, generator=normal)
        sae.fold_activation_whitening(mean, matrix, torch.linalg.inv(matrix))
        if place.endswith("hook_z"):
            first.turn_off_forward_pass_hook_z_reshaping()
        return sae, lambda x: first.encode((x.reshape(*IDS.shape, -1) - mean) @ matrix)
    return sae, first.encode


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    small_blocks(monkeypatch)


@pytest.mark.parametrize("kind", AUTOENCODERS + TRANSCODERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_on_a_plain_model_are_those_of_sae_lens(family, kind):
    model, places = make_model(family), TRANSCODER_PLACES if kind in TRANSCODERS else PLACES
    for scaling, bias in cases(kind):
        made = {place: make(kind, place, scaling, bias) for place in places}
        ours = encode(model, [sae for sae, _ in made.values()])
        for (place, (_, oracle)), found in zip(made.items(), ours, strict=True):
            with torch.no_grad():
                expected = oracle(streams(family)[f"blocks.1.{place}"]).reshape(found.shape)
                elsewhere = oracle(streams(family)[f"blocks.2.{place}"]).reshape(found.shape)
            case = f"{place}, {scaling}, b_dec {bias}"
            assert (found - expected).abs().max() <= TOLERANCE, case
            assert expected.count_nonzero() > expected.shape[0] * expected.shape[1], case
            assert (found - elsewhere).abs().max() > 1e-2, case  # the next block is noticed


@pytest.mark.parametrize("family", FAMILIES)
def test_places_in_and_before_the_mlps_norm_are_told_apart(family):
    """Each of the transcoders' places gives other features, except one that has two names."""
    made = {place: make("transcoder", place, "none", False)[0] for place in TRANSCODER_PLACES}
    ours = dict(zip(made, encode(make_model(family), made.values()), strict=True))
    assert torch.equal(ours["hook_mlp_in"], ours["hook_resid_mid"])
    del ours["hook_mlp_in"]
    for place, features in ours.items():
        assert all(place == other or (features - ours[other]).abs().max() > 1e-2 for other in ours), place


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inside_of_a_norm_is_what_a_model_with_folded_gains_gives_its_mlp(family):
    """Gemma Scope's transcoders were trained behind norms whose gains were folded into the MLP."""
    model = make_model(family)
    with torch.no_grad():
        folded = make_hooked(model, fold_ln=True).run_with_cache(IDS)[1]["blocks.1.mlp.hook_in"]
    sae = make_sae("blocks.1.ln2.hook_normalized", kind="jumprelu_transcoder")
    (ours,) = encode(model, [sae])
    assert (ours - sae.encode(folded)).abs().max() <= TOLERANCE
    assert (ours - sae.encode(streams(family)["blocks.1.mlp.hook_in"])).abs().max() > 1e-2


def test_gemma_scope_2_reads_the_output_of_the_norm_that_it_names():
    name = "model.layers.1.pre_feedforward_layernorm"
    sae = make_sae("blocks.1.hook_mlp_in", kind="jumprelu_skip_transcoder", hf_hook_name=f"{name}.output")
    model, found = make_model("gemma3"), []
    handle = model.get_submodule(name).register_forward_hook(lambda *args: found.append(args[2].detach()))
    model(IDS)
    handle.remove()
    (ours,) = encode(model, [sae])
    assert (ours - sae.encode(found[0])).abs().max() <= TOLERANCE


def test_a_gain_of_zero_does_not_hide_what_is_before_it():
    model = make_model()
    model.model.layers[1].post_attention_layernorm.weight.data[:7] = 0
    sae = make_sae("blocks.1.ln2.hook_normalized", kind="transcoder")
    with torch.no_grad():
        expected = make_hooked(model).run_with_cache(IDS)[1]["blocks.1.ln2.hook_normalized"]
    assert (encode(model, [sae])[0] - sae.encode(expected)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("place", PLACES)
def test_centred_writing_weights_are_those_of_sae_lens_model(place):
    model, settings = make_model("gpt2"), {"center_writing_weights": True}
    sae = make_sae(f"blocks.1.{place}", settings={"reshape_activations": "hook_z" if place.endswith("z") else "none"})
    sae.cfg.metadata.model_from_pretrained_kwargs = settings
    with torch.no_grad():
        centred = make_hooked(model, **settings).run_with_cache(IDS)[1][f"blocks.1.{place}"]
    (ours,) = encode(model, [sae])
    assert (ours - sae.encode(centred)).abs().max() <= TOLERANCE
    if place.startswith("hook"):
        assert (ours - sae.encode(streams("gpt2")[f"blocks.1.{place}"])).abs().max() > 1e-3


@pytest.mark.parametrize("kind", TRAINED)
def test_saes_in_training_are_encoded_as_sae_lens_does(kind):
    sae_cls, config_cls = get_sae_training_class(kind)
    settings = {"k": 5} if "topk" in kind else {"decoder_init_norm": 1.0} if kind == "matching_pursuit" else {}
    known = SAEMetadata(hook_name="blocks.1.hook_resid_pre")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = sae_cls(config_cls(d_in=WIDTH, d_sae=64, metadata=known, **settings))
    (ours,) = encode(make_model(), [sae])
    with torch.no_grad():
        expected = sae.encode(streams("llama")["blocks.1.hook_resid_pre"])
    expected = expected.to_dense() if expected.is_sparse else expected
    assert (ours - expected).abs().max() <= TOLERANCE
    assert ours.count_nonzero() > 0


def _joint(kind):
    sae_cls, config_cls = get_sae_training_class(kind)
    settings = {"matryoshka_widths": [16, 64]} if "matryoshka" in kind else {}
    known = SAEMetadata(hook_name="blocks.1.hook_resid_pre")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = sae_cls(config_cls(d_in=WIDTH, d_sae=64, k=4, metadata=known, **settings))
    sae.W_enc.data *= 100  # the stream is short at first
    sae.topk_threshold = torch.tensor(0.05, dtype=torch.double)
    return sae


@pytest.mark.parametrize("kind", SAVED_FIRST)
def test_saes_that_choose_over_a_batch_are_refused_until_they_are_saved_for_inference(kind, tmp_path):
    sae = _joint(kind)
    with pytest.raises(MismatchError, match=f"architecture '{kind}'.*Save a trained one for inference"):
        load_saes(sae)
    sae.save_inference_model(tmp_path / "sae")
    (handle,) = load_saes(tmp_path / "sae")
    assert handle.sae.cfg.architecture() == "jumprelu"
    with torch.no_grad():
        expected = SAE.load_from_disk(tmp_path / "sae").encode(streams("llama")["blocks.1.hook_resid_pre"])
    assert (encode(make_model(), [handle.sae])[0] - expected).abs().max() <= TOLERANCE
    assert 0 < expected.count_nonzero() < expected.numel() / 2


def test_temporal_saes_are_refused():
    sae_cls, config_cls = SAE_CLASS_REGISTRY["temporal"]
    known = SAEMetadata(hook_name="blocks.1.hook_resid_pre")
    sae = sae_cls(config_cls(d_in=WIDTH, d_sae=64, metadata=known, n_heads=4, bottleneck_factor=1))
    with pytest.raises(MismatchError, match=r"architecture 'temporal'.*depend on the tokens beside it"):
        load_saes(sae)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # sae-lens makes sparse tensors unchecked
def test_sparse_activations_of_topk_come_back_dense():
    sae = make_sae("blocks.1.hook_resid_pre", kind="topk")
    sae.activation_fn.use_sparse_activations = True
    (ours,) = encode(make_model(), [sae])
    with torch.no_grad():
        expected = sae.encode(streams("llama")["blocks.1.hook_resid_pre"])
    assert expected.is_sparse
    assert not ours.is_sparse
    assert (ours - expected.to_dense()).abs().max() <= TOLERANCE


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_lengths_of_the_decoders_rows_do_not_matter(length):
    for kind in ("standard", "jumprelu", "topk", "gated"):
        sae = make_sae("blocks.1.hook_resid_pre", kind=kind)
        before = encode(make_model(), [sae])[0]
        sae.W_dec.data *= length
        (ours,) = encode(make_model(), [sae])
        with torch.no_grad():
            expected = sae.encode(streams("llama")["blocks.1.hook_resid_pre"])
        assert (ours - expected).abs().max() <= TOLERANCE
        assert torch.equal(ours, before)


@pytest.mark.parametrize(
    ("sae_dtype", "model_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_sae_and_model_of_different_precision(family, sae_dtype, model_dtype):
    model = make_model(family).to(getattr(torch, model_dtype))
    sae = make_sae("blocks.1.hook_resid_pre", kind="jumprelu").to(dtype=getattr(torch, sae_dtype))
    with torch.no_grad():
        expected = sae.encode(model(IDS, output_hidden_states=True).hidden_states[1])
    (ours,) = encode(model, [sae])
    assert ours.dtype == getattr(torch, sae_dtype)
    assert torch.equal(ours, expected)
    assert ours.count_nonzero() > 0
