"""Thousands of changed files: each is refused with one of our errors, or gives a right load."""

import copy
import json
import math
import shutil

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError

from peft_sae import FeatureStatistics, SaeSubspaceConfig, Subspace, export_lora, merge_checkpoint
from peft_sae.adapter import read_edits
from peft_sae.artifact import digest
from peft_sae.edit import edit_adapter
from peft_sae.edit.record import edits_section
from peft_sae.inspect import inspect_adapter
from peft_sae.jobs import read_job
from peft_sae.jobs.selection import read_selection
from peft_sae.statistics import Measures
from peft_sae.statistics.share import Share
from peft_sae.statistics.state import Progress, StateFile
from tests.statistics.dense import collect, double_saes, make_texts
from tests.tiny import make_model, make_subspace

from . import oracles
from .artefacts import EDITS, JOBS, make_adapter
from .fuzzing import EXAMPLES, Artefact, fuzz, sign_folder, sign_state
from .mutations import parse

MEASURES = Measures(histograms=True, covariance=True, top_examples=3, sample=4)


def test_thousands_of_files_are_changed():
    assert sum(EXAMPLES.values()) >= 2000


@pytest.fixture(scope="module")
def statistics(tokenizer):
    data = {"aligned": make_texts(5, 0), "unaligned": make_texts(2, 1)}
    saes = double_saes(("blocks.1.hook_resid_post",), features=6)
    return collect(make_model().double(), tokenizer, data, saes, measures=MEASURES)


def test_subspaces(tmp_path, monkeypatch):
    subspace = make_subspace(
        make_model(),
        {"blocks.1.hook_resid_post": 3, "blocks.2.hook_resid_mid": 2},
        protected={"blocks.0.hook_resid_post": 2},
    )
    subspace.save_pretrained(tmp_path / "artefact")
    names = ("subspace.json", "subspace.safetensors")
    artefact = Artefact(tmp_path, names, sign=sign_folder(*names))

    def check(found, name, change):
        if not change.signed:  # nothing that counts has changed, or the digest would not fit
            assert found.digest == subspace.digest
            return
        oracles.check_subspace(artefact.folder, found)
        found.save_pretrained(tmp_path / "again")
        assert Subspace.from_pretrained(tmp_path / "again").digest == found.digest

    fuzz("subspace", artefact, Subspace.from_pretrained, check, monkeypatch)


def test_statistics(statistics, tmp_path, monkeypatch):
    statistics.save_pretrained(tmp_path / "artefact")
    names = ("statistics.json", "statistics.safetensors")
    artefact = Artefact(tmp_path, names, sign=sign_folder(*names))
    original = oracles.read_json(artefact.folder / names[0])["digest"]

    def check(found, name, change):
        data = oracles.read_json(artefact.folder / names[0])
        if not change.signed:
            assert data["digest"] == digest(*found.to_tensors()) == original
            return
        oracles.check_statistics(data, oracles.read_tensors((artefact.folder / names[1]).read_bytes()), found)
        found.save_pretrained(tmp_path / "again")
        assert oracles.read_json(tmp_path / "again" / names[0])["digest"] == data["digest"]

    fuzz("statistics", artefact, FeatureStatistics.from_pretrained, check, monkeypatch)


RUN = {"model": {"name": "m", "hidden_size": 32}, "saes": ["a"], "settings": {"max_length": None, "batch": 2.5}}


def test_states_of_a_collection(statistics, tmp_path, monkeypatch):
    def file(folder):
        return StateFile(folder / "run.state", RUN, Share(), 1.0)

    (tmp_path / "artefact").mkdir()
    file(tmp_path / "artefact").write(Progress(statistics, {"aligned": 2, "unaligned": 1}))
    artefact = Artefact(tmp_path, ["run.state"], sign=sign_state("run.state", "peft_sae.state"), usual=("link",))

    def check(found, name, change):
        if found is None:
            assert change.content == "nothing"
            return
        header, _ = parse((artefact.folder / "run.state").read_bytes())
        data = json.loads(header["__metadata__"]["peft_sae.state"])
        assert data["digest"] == digest(*found.statistics.to_tensors())
        if change.signed:
            tensors = oracles.read_tensors((artefact.folder / "run.state").read_bytes())
            oracles.check_statistics(data, tensors, found.statistics, complete=False)
        assert oracles.same(data["run"], RUN)
        assert oracles.same(data["batches"], found.batches)
        assert set(found.batches) == set(found.statistics.moments)
        assert min(found.batches.values()) >= 1

    fuzz("state", artefact, lambda folder: file(folder).read(), check, monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of an adapter with its Subspace, and of its base."""
    return make_adapter(tmp_path_factory.mktemp("trained"))


def copied(trained, tmp_path, *names, **options):
    shutil.copytree(trained / "adapter", tmp_path / "artefact")
    return Artefact(tmp_path, names, **options)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about fields that it ignores
def test_configurations(trained, tmp_path, monkeypatch):
    artefact = copied(trained, tmp_path, "adapter_config.json")

    def check(found, name, change):
        data = oracles.read_json(artefact.folder / "adapter_config.json")
        oracles.check_config(data, found)
        found.save_pretrained(tmp_path / "again")
        again = type(found).from_pretrained(tmp_path / "again").to_dict()
        # Where its Subspace lies is told by the folder that it is read from.
        assert {**again, "subspace": None} == {**found.to_dict(), "subspace": None}
        shutil.rmtree(tmp_path / "again")

    fuzz("config", artefact, SaeSubspaceConfig.from_pretrained, check, monkeypatch)


def test_records_of_edits(tmp_path, monkeypatch):
    (tmp_path / "artefact").mkdir()
    (tmp_path / "artefact" / "edit.json").write_text(json.dumps(EDITS))
    artefact = Artefact(tmp_path, ["edit.json"])

    def check(found, name, change):
        if change.content == "nothing":
            assert found == []
            return
        assert oracles.same(oracles.read_json(artefact.folder / "edit.json")["edits"], found)
        for edit in found:
            assert edit["kind"] in ("scale", "keep")
            assert all(math.isfinite(one["factor"]) for one in edit["features"])
        edits_section(found)

    fuzz("edits", artefact, read_edits, check, monkeypatch)


@pytest.mark.parametrize(("kind", "read"), [("job", read_job), ("selection", read_selection)])
def test_jobs(kind, read, tmp_path, monkeypatch):
    (tmp_path / "artefact").mkdir()
    (tmp_path / "artefact" / "job.yaml").write_text(json.dumps(JOBS[kind]))
    # A job's file is the user's own: it may be a link, or what a shell puts into a pipe.
    artefact = Artefact(tmp_path, ["job.yaml"], usual=("fifo", "link"))

    def check(found, name, change):
        data = yaml.safe_load((artefact.folder / "job.yaml").read_text(encoding="utf-8"))
        oracles.check_job(data, found)
        if kind == "job":
            assert found.adapter_config().freeze_basis is found.adapter.get("freeze_basis", False)

    fuzz(kind, artefact, lambda folder: read(folder / "job.yaml"), check, monkeypatch)


ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


def test_adapters_that_are_exported(trained, tmp_path, monkeypatch):
    artefact = copied(trained, tmp_path, *ADAPTER)

    def load(folder):
        shutil.rmtree(tmp_path / "lora", ignore_errors=True)
        return export_lora(folder, tmp_path / "lora")

    def check(found, name, change):
        written = oracles.read_tensors((found / ADAPTER[0]).read_bytes())
        given = oracles.read_tensors((artefact.folder / ADAPTER[0]).read_bytes())
        oracles.check_finite(written)
        assert written.keys() == given.keys()
        assert all(torch.equal(written[key], given[key]) for key in given)
        assert oracles.read_json(found / ADAPTER[1])["peft_type"] == "LORA"

    fuzz("export", artefact, load, check, monkeypatch)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


SUBSPACE = ("subspace/subspace.json", "subspace/subspace.safetensors")


def make_all(trained, tmp_path, **options):
    """An adapter with its Subspace, whose digest is made to fit."""
    return copied(trained, tmp_path, *ADAPTER, *SUBSPACE, sign=sign_folder(*SUBSPACE), **options)


def products(content):
    """Norm of B A, and rank, by module, in float64, from an adapter's file."""
    tensors = {key: tensor.double() for key, tensor in oracles.read_tensors(content).items()}
    ends = (".lora_A.weight", ".lora_B.weight")
    modules = {key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0]) and tensors[key].ndim == 2}
    pairs = {module.removeprefix("base_model.model."): [tensors[module + end] for end in ends] for module in modules}
    return {module: (float((b @ a).norm()), a.shape[0]) for module, (a, b) in pairs.items()}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about fields that it ignores
def test_adapters_that_are_inspected(trained, tmp_path, monkeypatch):
    artefact = make_all(trained, tmp_path)

    def load(folder):
        return inspect_adapter(folder, trained / "base", progress=False)

    def check(found, name, change):
        norms = products((artefact.folder / ADAPTER[0]).read_bytes())
        defaults = {"lora_alpha": 8, "alpha_pattern": None, "use_rslora": False}
        config = defaults | oracles.read_json(artefact.folder / ADAPTER[1])
        for row in found.modules.itertuples():
            norm, rank = norms.pop(row.module)
            pattern = (config["alpha_pattern"] or {}).items()
            alpha = next(
                (value for end, value in pattern if f".{row.module}".endswith(f".{end}")), config["lora_alpha"]
            )
            scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
            assert math.isclose(row.norm, abs(scaling) * norm, rel_tol=1e-4, abs_tol=1e-9), row
            for share in (row.in_basis, row.in_random, row.chance):
                assert share is None or math.isnan(share) or -1e-6 <= share <= 1 + 1e-6
        assert not norms
        assert found.features["share"].dropna().between(0, 1 + 1e-6).all()
        found.save(tmp_path / "report.html")

    fuzz("inspect", artefact, load, check, monkeypatch)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_that_are_edited(trained, tmp_path, monkeypatch):
    artefact = make_all(trained, tmp_path)

    def load(folder):
        shutil.rmtree(tmp_path / "edited", ignore_errors=True)
        return edit_adapter(folder, tmp_path / "edited", remove=["blocks.1.hook_resid_pre:1"], model=trained / "base")

    def check(found, name, change):
        """What is removed is projected out, so no update grows; everything else comes along."""
        before, after = (products((folder / ADAPTER[0]).read_bytes()) for folder in (artefact.folder, found))
        assert before.keys() == after.keys()
        assert all(after[module][0] <= before[module][0] * (1 + 1e-5) for module in before)
        assert read_edits(found)[-1]["features"][0]["name"] == "blocks.1.hook_resid_pre:1"
        assert not any(path.is_symlink() for path in found.rglob("*"))

    fuzz("edit", artefact, load, check, monkeypatch)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
def test_adapters_that_are_loaded(trained, tmp_path, monkeypatch):
    # PEFT looks for the type before us, wherever a link leads, and waits for a pipe.
    artefact = make_all(trained, tmp_path, usual=("fifo", "link"))
    base = make_model(num_hidden_layers=2)

    def load(folder):
        return PeftModel.from_pretrained(copy.deepcopy(base), folder)

    def check(found, name, change):
        given = oracles.read_tensors((artefact.folder / ADAPTER[0]).read_bytes())
        loaded = get_peft_model_state_dict(found, save_embedding_layers=False)
        assert loaded.keys() == given.keys()
        for key in given:
            torch.testing.assert_close(loaded[key], given[key].to(loaded[key].dtype), rtol=0, atol=0, equal_nan=True)

    # It opens the weights, too, and tells of missing ones by a warning, of shapes by a RuntimeError.
    foreign = (RuntimeError, Warning, SafetensorError, ValueError, TypeError, KeyError, OSError)
    fuzz("load", artefact, load, check, monkeypatch, foreign=foreign)


def test_bases_and_adapters_that_are_merged(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "artefact")
    shards = sorted(path.name for path in (trained / "base").glob("*.safetensors"))
    names = [f"adapter/{name}" for name in ADAPTER] + ["base/config.json", "base/model.safetensors.index.json"]
    artefact = Artefact(tmp_path, [*names, f"base/{shards[0]}"])

    def load(folder):
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        return merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "merged")

    def check(found, name, change):
        """What no adapter touches is as the base has it; what one does has the base's shape."""
        written, base = {}, {}
        for folder, tensors in ((found, written), (artefact.folder / "base", base)):
            for path in folder.glob("*.safetensors"):
                tensors |= oracles.read_tensors(path.read_bytes())
        assert written.keys() <= base.keys()
        for key, tensor in written.items():
            assert tensor.shape == base[key].shape, key
            if not key.endswith(("q_proj.weight", "o_proj.weight")):
                torch.testing.assert_close(tensor, base[key], rtol=0, atol=0, equal_nan=True)

    fuzz("merge", artefact, load, check, monkeypatch)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
