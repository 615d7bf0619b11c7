import json

import pytest
import sae_lens
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata

from peft_sae import load_saes
from peft_sae.errors import ArtifactError, ConfigError, MismatchError
from peft_sae.layout import Site
from peft_sae.sae import SaeIdentity
from tests.tiny import WIDTH, make_sae

GEMMA, LLAMA, GPT2 = "gemma-scope-2b-pt-res-canonical", "llama_scope_lxr_8x", "gpt2-small-res-jb"


def _activations(*shape, seed=0):
    return 2 + torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _names(handles):
    return [handle.identity.name for handle in handles]


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


def _save(folder, name, hook_name, **kwargs):
    make_sae(hook_name, **kwargs).save_model(folder / name)


def test_objects_come_in_the_order_of_their_blocks():
    saes = [make_sae(f"blocks.{block}.hook_resid_post") for block in (2, 0, 1)]
    assert [handle.identity.site.block for handle in load_saes(saes)] == [0, 1, 2]
    assert [handle.identity.site.block for handle in load_saes(iter(saes), layers=[2, 1])] == [1, 2]
    assert [handle.sae for handle in load_saes(saes, ids=["sae/blocks.2.hook_resid_post"])] == saes[:1]


def test_folder_gives_the_saved_sae(tmp_path):
    _save(tmp_path, "one", "blocks.1.hook_resid_post", kind="jumprelu")
    (handle,) = load_saes(tmp_path / "one")
    (original,) = load_saes(make_sae(kind="jumprelu"))
    assert handle.identity.name == "one"
    assert handle.identity.digest == original.identity.digest
    x = _activations(7, WIDTH)
    assert torch.equal(handle.encode(x), original.encode(x))
    assert load_saes(str(tmp_path / "one"), dtype="bfloat16")[0].decoder.dtype == torch.bfloat16


def test_folder_of_folders_gives_all_or_the_chosen(tmp_path):
    for name, block in [("a", 2), ("b", 0), ("c", 1)]:
        _save(tmp_path, name, f"blocks.{block}.hook_resid_post", seed=block)
    (tmp_path / "notes").mkdir()
    assert _names(load_saes(tmp_path)) == ["b", "c", "a"]
    assert _names(load_saes(tmp_path, layers=[2, 0])) == ["b", "a"]
    assert _names(load_saes(tmp_path, ids=["c"])) == ["c"]


@pytest.mark.parametrize("where", ["folder", "folder of folders"])
def test_unknown_names_and_layers_of_folders_list_what_is_there(tmp_path, where):
    _save(tmp_path, "one", "blocks.1.hook_resid_post")
    folder = tmp_path / "one" if where == "folder" else tmp_path
    with pytest.raises(ConfigError, match=r"no SAEs named \['two'\].*\['one'\]"):
        load_saes(folder, ids=["two"])
    with pytest.raises(ConfigError, match=r"No SAE belongs to the layers \[5\].*blocks\.1\.hook_resid_post"):
        load_saes(folder, layers=[1, 5])


def test_damaged_or_empty_folders_are_artifact_errors(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no SAE.*cfg\.json"):
        load_saes(tmp_path)
    _save(tmp_path, "one", "blocks.1.hook_resid_post")
    weights = tmp_path / "one" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"cannot be loaded.*Write it again"):
        load_saes(tmp_path / "one")
    (tmp_path / "one" / "cfg.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_saes(tmp_path)


@pytest.fixture
def downloads(monkeypatch):
    """Stands in for the network: records what sae-lens was asked for."""
    asked = []

    def from_pretrained(release, sae_id, device, dtype):
        asked.append((release, sae_id, device, dtype))
        return make_sae(f"blocks.{len(asked)}.hook_resid_post")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", from_pretrained)
    return asked


@pytest.mark.parametrize(
    ("release", "layers", "ids"),
    [
        (LLAMA, [10], ["l10r_8x"]),
        (LLAMA, [1], ["l1r_8x"]),
        (GPT2, [10, 1], ["blocks.1.hook_resid_pre", "blocks.10.hook_resid_pre"]),
        ("qwen-scope-3-8b-base-w64k-l50", [3], ["layer3"]),
        ("llama-3.1-8b-instruct-andyrdt", [3], ["resid_post_layer_3_trainer_1"]),
    ],
)
def test_layers_of_a_release_find_their_ids(downloads, release, layers, ids):
    load_saes(release, layers=layers)
    assert downloads == [(release, sae_id, "cpu", "float32") for sae_id in ids]


def test_ids_of_a_release_keep_their_order_and_get_neuronpedia_names(downloads):
    ids = ["layer_20/width_16k/canonical", "layer_5/width_16k/canonical"]
    handles = load_saes(GEMMA, ids=ids, dtype="bfloat16")
    assert [(asked[1], asked[3]) for asked in downloads] == [(sae_id, "bfloat16") for sae_id in ids]
    assert _names(handles) == [f"{GEMMA}/{sae_id}" for sae_id in ids]
    url = "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/3"
    assert handles[0].identity.neuronpedia_url(3) == url


@pytest.mark.parametrize(
    ("release", "choice", "message"),
    [
        (GEMMA, {"layers": [20]}, r"Layer 20 of release .* SAEs \(\['layer_20/width_16k/canonical'.*ids="),
        (
            GPT2,
            {"layers": [11]},
            r"Layer 11 .* has 2 SAEs \(\['blocks.11.hook_resid_pre', 'blocks.11.hook_resid_post'\]",
        ),
        (GEMMA, {"layers": [77]}, r"Layer 77 of release .* has 0 SAEs"),
        (GEMMA, {}, r"Say which with ids=\[...\] or layers="),
        (GEMMA, {"ids": ["layer_20/width_16k"]}, r"no SAEs \['layer_20/width_16k'\].*'layer_20/width_16k/canonical'"),
        ("gemma-scope-2b-res", {"layers": [20]}, "neither a folder nor a release.*gemma-scope-2b-pt-res"),
        (LLAMA, {"ids": ["l1r_8x"], "layers": [1]}, "Give one of them"),
    ],
)
def test_unclear_choice_of_a_release_is_an_error_that_shows_the_way(downloads, release, choice, message):
    with pytest.raises(ConfigError, match=message):
        load_saes(release, **choice)
    assert downloads == []


def test_failed_download_names_release_and_id(monkeypatch):
    def from_pretrained(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", from_pretrained)
    with pytest.raises(ArtifactError, match=rf"'l1r_8x' of release '{LLAMA}'.*no route to host.*Check the network"):
        load_saes(LLAMA, layers=[1])


def test_cross_layer_transcoders_of_a_release_are_refused_before_they_are_loaded(downloads):
    with pytest.raises(MismatchError, match=r"'layer_0' of release 'mntss.*cross-layer transcoder.*sum of these dec"):
        load_saes("mntss-gemma-2-2b-2.5m-clt-as-per-layer", ids=["layer_0"])
    assert downloads == []


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


def test_no_sae_and_no_sae_object_are_config_errors():
    with pytest.raises(ConfigError, match="No SAE is given"):
        load_saes([])
    with pytest.raises(ConfigError, match="A tuple is given where an SAE is needed"):
        load_saes([(make_sae(), {}, None)])
    with pytest.raises(ConfigError, match="A Linear is given"):
        load_saes(torch.nn.Linear(2, 2))
