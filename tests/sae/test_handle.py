import json

import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata

from peft_sae import load_saes
from peft_sae.errors import ArtifactError, MismatchError
from peft_sae.layout import Site
from peft_sae.sae import SaeIdentity
from tests.tiny import WIDTH, make_sae


def _activations(*shape, seed=0):
    return 2 + torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "gated"])
def test_encode_equals_sae_lens(kind):
    sae = make_sae(kind=kind)
    x = _activations(7, WIDTH)
    (handle,) = load_saes(sae)
    features = handle.encode(x)
    assert features.count_nonzero() > 0
    torch.testing.assert_close(features, sae.encode(x).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scaling", ["layer_norm", "constant_norm_rescale"])
def test_encode_honours_input_scaling_and_leaves_no_trace_of_it(scaling):
    sae, plain = make_sae(settings={"normalize_activations": scaling}), make_sae()
    x = _activations(7, WIDTH)
    handle = load_saes(sae)[0]
    before = set(vars(sae))
    features = handle.encode(x)
    assert set(vars(sae)) == before
    torch.testing.assert_close(features, sae.encode(x).detach(), rtol=0, atol=1e-6)
    assert not torch.allclose(features, plain.encode(x), atol=1e-3)


def test_layer_norm_scaling_is_the_formula():
    sae = make_sae(settings={"normalize_activations": "layer_norm"})
    x = _activations(7, WIDTH)
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.std(-1, keepdim=True) + 1e-5)
    expected = torch.relu((scaled - sae.b_dec) @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(load_saes(sae)[0].encode(x), expected.detach(), rtol=0, atol=1e-5)


def test_centred_writing_weights_take_the_mean_off():
    sae = make_sae()
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    x = _activations(7, WIDTH)
    expected = sae.encode(x - x.mean(-1, keepdim=True)).detach()
    torch.testing.assert_close(load_saes(sae)[0].encode(x), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, sae.encode(x), atol=1e-2)


def test_centred_writing_weights_do_not_touch_the_heads_outputs():
    sae = make_sae("blocks.1.attn.hook_z")
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    x = _activations(7, WIDTH)
    torch.testing.assert_close(load_saes(sae)[0].encode(x), sae.encode(x).detach(), rtol=0, atol=1e-6)


def test_hook_z_sae_takes_heads_side_by_side_and_keeps_its_reshaping():
    sae = make_sae("blocks.1.attn.hook_z", settings={"reshape_activations": "hook_z"})
    heads = _activations(7, 4, WIDTH // 4)
    rebuilt = sae(heads)
    before = dict(vars(sae))
    (handle,) = load_saes(sae)
    torch.testing.assert_close(handle.encode(heads.flatten(1)), sae.encode(heads).detach(), rtol=0, atol=1e-6)
    assert vars(sae) == before
    assert sae.hook_z_reshaping_mode
    torch.testing.assert_close(sae.decode(handle.encode(heads.flatten(1))), rebuilt, rtol=0, atol=1e-6)


def test_sae_is_as_before_when_encoding_fails():
    sae = make_sae("blocks.1.attn.hook_z", settings={"reshape_activations": "hook_z"})
    before = dict(vars(sae))
    with pytest.raises(RuntimeError):
        load_saes(sae)[0].encode(_activations(7, WIDTH + 1))
    assert vars(sae) == before


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # sae-lens makes sparse tensors unchecked
def test_sparse_features_come_back_dense():
    sae = make_sae(kind="topk")
    dense = load_saes(sae)[0].encode(_activations(7, WIDTH))
    sae.activation_fn.use_sparse_activations = True
    sparse = load_saes(sae)[0].encode(_activations(7, WIDTH))
    assert not sparse.is_sparse
    assert torch.equal(sparse, dense)


def test_half_precision_activations_are_encoded_in_the_precision_of_the_sae():
    sae = make_sae()
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    x = _activations(7, WIDTH).bfloat16()
    exact = sae.encode(x.float() - x.float().mean(-1, keepdim=True)).detach()
    features = load_saes(sae)[0].encode(x)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, exact, rtol=0, atol=1e-6)


def test_identity_says_what_the_metadata_say():
    sae = make_sae("blocks.1.hook_mlp_out", model_name="my-model", neuronpedia_id="my-model/1-mlp")
    (handle,) = load_saes(sae)
    identity = handle.identity
    assert (identity.hook_name, identity.d_in, identity.d_sae) == ("blocks.1.hook_mlp_out", WIDTH, 64)
    assert (identity.model_name, identity.name) == ("my-model", "my-model/1-mlp")
    assert identity.neuronpedia_url(7) == "https://www.neuronpedia.org/my-model/1-mlp/7"
    assert load_saes(make_sae())[0].identity.neuronpedia_url(7) is None
    assert torch.equal(handle.decoder, sae.W_dec)
    assert not handle.decoder.requires_grad


def test_identity_of_a_transcoder_says_where_it_reads_and_where_its_directions_live():
    (handle,) = load_saes(make_sae("blocks.1.mlp.hook_in", kind="skip_transcoder", out=48, model_name="my-model"))
    identity = handle.identity
    assert (identity.hook_name, identity.hook_name_in) == ("blocks.1.hook_mlp_out", "blocks.1.mlp.hook_in")
    assert (identity.site, identity.site_in) == (Site(1, "mlp_out"), Site(1, "mlp_in"))
    assert (identity.d_in, handle.decoder.shape) == (48, (64, 48))
    assert handle.encode(_activations(7, WIDTH)).shape == (7, 64)
    assert SaeIdentity.from_dict(json.loads(json.dumps(identity.to_dict()))) == identity


def test_an_sae_reads_where_its_directions_live():
    identity = load_saes(make_sae("blocks.1.attn.hook_z"))[0].identity
    assert identity.hook_name_in is None
    assert identity.site_in == identity.site == Site(1, "z")


@pytest.mark.parametrize(
    ("metadata", "hook_name", "kind"),
    [
        # TransformerLens puts it before the norm, Gemma Scope 2 behind it: its own name tells.
        ({}, "blocks.1.hook_mlp_in", "resid_mid"),
        ({"hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output"}, "blocks.1.mlp.hook_in", "mlp_in"),
    ],
)
def test_hook_mlp_in_is_what_the_release_means_by_it(metadata, hook_name, kind):
    identity = load_saes(make_sae("blocks.1.hook_mlp_in", kind="transcoder", **metadata))[0].identity
    assert (identity.hook_name_in, identity.site_in) == (hook_name, Site(1, kind))


def test_files_of_before_there_were_transcoders_are_read():
    identity = load_saes(make_sae())[0].identity
    data = identity.to_dict()
    del data["hook_name_in"]
    assert SaeIdentity.from_dict(data) == identity


@pytest.mark.parametrize("value", [7, True, ["blocks.1.mlp.hook_in"]])
def test_identity_with_a_wrong_place_to_read_is_an_artifact_error(value):
    data = {**load_saes(make_sae())[0].identity.to_dict(), "hook_name_in": value}
    with pytest.raises(ArtifactError, match="'hook_name_in' of an SAE's identity"):
        SaeIdentity.from_dict(data)


@pytest.mark.parametrize(
    ("hook_name", "centred"),
    [("blocks.1.hook_resid_mid", True), ("blocks.1.mlp.hook_in", False), ("blocks.1.ln2.hook_normalized", False)],
)
def test_centred_writing_weights_count_where_the_encoder_reads(hook_name, centred):
    sae = make_sae(hook_name, kind="transcoder")
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    assert load_saes(sae)[0].center_input is centred


def test_centring_is_not_done_in_the_saes_lower_precision():
    sae = make_sae().to(dtype=torch.bfloat16)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    x = 1000 + _activations(7, WIDTH)
    assert torch.equal(load_saes(sae)[0].encode(x), sae.encode(x - x.mean(-1, keepdim=True)))


def test_digest_tells_weights_apart():
    first, again, other = (load_saes(make_sae(seed=seed))[0].identity.digest for seed in (0, 0, 1))
    assert first == again != other


def _without_hook():
    return make_sae("")


def _unfolded(scaling):
    return make_sae(settings={"normalize_activations": scaling})


def _nan():
    sae = make_sae()
    sae.W_dec.data[3, 4] = float("nan")
    return sae


def _transcoder(hook_name="blocks.1.mlp.hook_in", **metadata):
    return make_sae(hook_name, kind="transcoder", **metadata)


def _three_dimensional():
    sae = _transcoder()
    sae.W_dec.data = sae.W_dec.data[:, None].expand(-1, 3, -1).clone()
    return sae


def _folded_gain():
    sae = _transcoder()
    sae.cfg.metadata.model_from_pretrained_kwargs = {"fold_ln": True}
    return sae


def _joint():
    known = SAEMetadata(hook_name="blocks.1.hook_resid_post")
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=WIDTH, d_sae=64, k=3, metadata=known))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_without_hook, r"name no hook point.*Set `sae\.cfg\.metadata\.hook_name`"),
        (lambda: make_sae("ln_final.hook_normalized"), "is not supported"),
        (lambda: make_sae("blocks.1.ln2.hook_normalized"), "a basis can be placed only at .*mlp_in"),
        (lambda: _transcoder(hook_name_out=None), r"does not say what it rebuilds.*metadata\.hook_name_out"),
        (lambda: _transcoder(hook_name_out="blocks.2.hook_mlp_out"), "in another block: cross-layer .* not supported"),
        (lambda: make_sae(hook_name_out="blocks.2.hook_mlp_out"), "cross-layer transcoders are not supported"),
        (_three_dimensional, r"shape \(64, 3, 32\).*Cross-layer transcoders are not supported"),
        (lambda: _transcoder("blocks.1.hook_q_input"), "'blocks.1.hook_q_input' is not supported"),
        (
            lambda: _transcoder("blocks.1.hook_mlp_in", hf_hook_name="model.layers.1.input_layernorm.output"),
            r"input_layernorm\.output', and it is not known that these are one place.*blocks\.N\.mlp\.hook_in",
        ),
        (_folded_gain, r"fold_ln=True.*'blocks\.1\.ln2\.hook_normalized'"),
        (_joint, "architecture 'batchtopk'.*depend on the tokens beside it"),
        (lambda: _unfolded("expected_average_only_in"), "not folded.*fold_activation_norm_scaling_factor"),
        (lambda: _unfolded("covariance_whitening"), "not folded.*fold_activation_whitening"),
        (_nan, r"W_dec at blocks\.1\.hook_resid_post holds NaN"),
        (lambda: [make_sae(), make_sae(seed=1)], r"same hook point blocks\.1\.hook_resid_post"),
    ],
)
def test_unusable_saes_are_mismatch_errors(make, message):
    with pytest.raises(MismatchError, match=message):
        load_saes(make())
