import pytest
import sae_lens
import torch

from peft_sae import load_saes
from peft_sae.errors import ArtifactError, ConfigError, MismatchError
from tests.tiny import WIDTH, make_sae

GEMMA, LLAMA, GPT2 = "gemma-scope-2b-pt-res-canonical", "llama_scope_lxr_8x", "gpt2-small-res-jb"


def _activations(*shape, seed=0):
    return 2 + torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _names(handles):
    return [handle.identity.name for handle in handles]


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


def test_no_sae_and_no_sae_object_are_config_errors():
    with pytest.raises(ConfigError, match="No SAE is given"):
        load_saes([])
    with pytest.raises(ConfigError, match="A tuple is given where an SAE is needed"):
        load_saes([(make_sae(), {}, None)])
    with pytest.raises(ConfigError, match="A Linear is given"):
        load_saes(torch.nn.Linear(2, 2))
