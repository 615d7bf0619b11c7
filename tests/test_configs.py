"""What configs/ names exists: every release and id in the directory that sae-lens ships, without any network."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from peft_sae import build_subspace, load_saes
from peft_sae.layout import Site
from peft_sae.sae.load import _ids_of_layers
from peft_sae.sae.model_names import is_other_model

CONFIGS = Path(__file__).parent.parent / "configs"
SELECTION = sorted((CONFIGS / "selection").glob("*.yaml"))
DIRECTORY = get_pretrained_saes_directory()

# The first three are what SAILS used (arXiv 2512.23260).
LAYERS = {
    "gemma-2-2b": [5, 10, 15, 20],
    "gemma-2-9b": [10, 15, 20, 25, 30],
    "llama-3.1-8b": [10, 15, 20, 25, 30],
    "gemma-3-1b": [7, 13, 17, 22],
    "qwen3-8b": [11, 17, 22, 28, 34],
}
WIDTHS = {"gemma-2-2b": 2304, "gemma-2-9b": 3584, "gemma-3-1b": 1152, "qwen3-8b": 4096}


def read(path):
    return yaml.safe_load(path.read_text())


def layer_of(path):
    """The layer that the published file's path names."""
    (number,) = re.findall(r"(?:layer_?|-L)(\d+)", path)
    return int(number)


@pytest.fixture(params=SELECTION, ids=lambda path: path.stem)
def job(request):
    return request.param.stem, read(request.param)


def test_there_are_five():
    assert [path.stem for path in SELECTION] == sorted(LAYERS)


def test_every_release_and_id_is_in_sae_lens_directory(job):
    name, config = job
    entry = DIRECTORY[config["saes"]]
    assert len(config["ids"]) == len(set(config["ids"])) == len(LAYERS[name])
    assert set(config["ids"]) <= set(entry.saes_map)
    assert [layer_of(entry.saes_map[sae_id]) for sae_id in config["ids"]] == LAYERS[name]


def test_the_model_is_the_one_that_the_release_was_trained_on(job):
    _, config = job
    trained_on = DIRECTORY[config["saes"]].model
    assert trained_on.split("/")[-1] == config["model"].split("/")[-1]
    assert not is_other_model(trained_on, model_type="", name=config["model"])


def test_the_saes_are_of_the_residual_stream_where_a_basis_has_a_place(job, monkeypatch):
    """As sae-lens' own loader names the place. Llama Scope's name is in a file of the release: R in its path is it."""
    name, config = job
    entry = DIRECTORY[config["saes"]]

    def no_file(repo_id, filename, **_):
        raise loaders.EntryNotFoundError(f"{filename} of {repo_id} is not looked for")

    monkeypatch.setattr(loaders, "hf_hub_download", no_file)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: {"w_enc": [WIDTHS[name], 16384]})
    config_of = {
        "gemma_2": loaders.get_gemma_2_config_from_hf,
        "gemma_3": loaders.get_gemma_3_config_from_hf,
        "qwen_scope": loaders.get_qwen_scope_config_from_hf,
    }
    for sae_id, layer in zip(config["ids"], LAYERS[name], strict=True):
        path = entry.saes_map[sae_id]
        if entry.conversion_func == "llama_scope":
            assert re.fullmatch(rf"Llama3_1-8B-Base-L{layer}R-8x", path)
            continue
        found = config_of[entry.conversion_func](entry.repo_id, path, "cpu")
        assert Site.from_hook_name(found["hook_name"]) == Site(layer, "resid_post")
        assert found["d_in"] == WIDTHS[name]
        assert not is_other_model(found["model_name"], model_type="", name=config["model"])


def test_keys_and_values_are_those_of_the_functions(job):
    _, config = job
    assert set(config) == {"model", "saes", "ids", "top_k", "variance", "tokens", "max_length", "dtype"}
    defaults = {name: value.default for name, value in inspect.signature(build_subspace).parameters.items()}
    for key in ("top_k", "variance", "tokens"):
        assert config[key] == defaults[key], key
    assert "ids" in inspect.signature(load_saes).parameters
    assert (config["max_length"], config["dtype"]) == (1024, "bfloat16")


def test_a_comment_says_where_it_comes_from():
    for path in SELECTION:
        assert path.read_text().startswith("# "), path.name
        assert "SAILS" in path.read_text(), path.name


def test_layers_alone_find_the_same_saes_where_the_release_has_one_per_layer():
    for path in SELECTION:
        config = read(path)
        known = list(DIRECTORY[config["saes"]].saes_map)
        if path.stem in ("llama-3.1-8b", "qwen3-8b"):
            assert _ids_of_layers(config["saes"], known, LAYERS[path.stem]) == config["ids"]


def test_training_jobs_are_for_models_that_have_a_selection():
    jobs = sorted(CONFIGS.glob("*.yaml"))
    assert jobs
    assert {read(path)["model"] for path in jobs} <= {read(path)["model"] for path in SELECTION}
    assert sorted(CONFIGS.rglob("*.yaml")) == sorted([*jobs, *SELECTION])
