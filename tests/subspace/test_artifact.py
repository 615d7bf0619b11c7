import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_sae import Subspace, build_subspace, load_saes
from peft_sae.errors import ArtifactError
from tests.tiny import ALIGNED, UNALIGNED, make_sae


def _same(first, second):
    names = ("features", "scores", "aligned_means", "unaligned_means", "aligned_rates", "unaligned_rates")
    names += ("directions", "basis", "coefficients")
    pairs = list(zip(first.sites, second.sites, strict=True))
    return all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in names)


def test_round_trip_is_bit_exact(subspace, tmp_path):
    subspace.save_pretrained(tmp_path / "s")
    read = Subspace.from_pretrained(tmp_path / "s")
    assert _same(read, subspace)
    assert read.digest == subspace.digest
    assert (read.layout, read.model, read.settings) == (subspace.layout, subspace.model, subspace.settings)
    assert [(site.sae, site.tokens) for site in read.sites] == [(site.sae, site.tokens) for site in subspace.sites]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["subspace.json", "subspace.safetensors"]


def test_saving_again_replaces_and_writes_the_same_bytes(subspace, tmp_path):
    files = []
    for _ in range(2):
        subspace.save_pretrained(tmp_path / "s")
        files.append({path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()})
    assert files[0] == files[1]


def test_adapter_folder_leads_to_its_subspace(subspace, tmp_path):
    subspace.save_pretrained(tmp_path / "adapter" / "subspace")
    assert Subspace.from_pretrained(str(tmp_path / "adapter")).digest == subspace.digest


@pytest.mark.parametrize("inner", ["", "subspace"])
def test_hub_repository_is_downloaded(subspace, tmp_path, monkeypatch, inner):
    subspace.save_pretrained(tmp_path / "snapshot" / inner)
    asked = []

    def snapshot_download(repository, **_):
        asked.append(repository)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert Subspace.from_pretrained("someone/refusal").digest == subspace.digest
    assert asked == ["someone/refusal"]


@pytest.mark.parametrize("name", ["someone/refusal", "not a name"])
def test_neither_folder_nor_repository_is_an_artifact_error(name):
    with pytest.raises(ArtifactError, match=rf"'{name}' is no folder here, and cannot be had from the Hub"):
        Subspace.from_pretrained(name)


@pytest.mark.parametrize("name", ["/no/such/folder", "./subspace", "outputs/job/subspace"])
def test_a_path_is_never_asked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))

    with pytest.raises(ArtifactError, match=rf"no folder '{name.removeprefix('./')}' \(the working directory is"):
        Subspace.from_pretrained(name)


def test_folder_without_a_subspace_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"has no subspace\.json"):
        Subspace.from_pretrained(tmp_path)


def test_foreign_folder_is_kept(subspace, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="would destroy"):
        subspace.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def _edit_json(change):
    def edit(folder):
        data = json.loads((folder / "subspace.json").read_text())
        change(data)
        (folder / "subspace.json").write_text(json.dumps(data))

    return edit


def _edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "subspace.safetensors")
        change(tensors)
        save_file(tensors, folder / "subspace.safetensors")

    return edit


def _cut(name, count):
    def cut(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-count])

    return cut


def _flip_last_byte(folder):
    path = folder / "subspace.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _site(data):
    return data["sites"][0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut("subspace.safetensors", 1), "damaged or truncated"),
        (_cut("subspace.safetensors", 5000), "damaged or truncated"),
        (_cut("subspace.json", 3), "cannot be read as JSON"),
        (lambda folder: (folder / "subspace.safetensors").unlink(), "folder is incomplete"),
        (lambda folder: (folder / "subspace.json").unlink(), r"has no subspace\.json"),
        (_flip_last_byte, "digest .* was written with it"),
        (_edit_tensors(lambda t: t.pop("1.basis")), r"lacks the tensors \['1\.basis'\]"),
        (_edit_tensors(lambda t: t.update(more=torch.zeros(1))), r"unexpected ones \['more'\]"),
        (_edit_tensors(lambda t: t.update({"0.basis": t["0.basis"][:1].clone()})), r"'0\.basis' .* was expected"),
        (_edit_tensors(lambda t: t.update({"0.basis": t["0.basis"].half()})), r"'0\.basis' .* is F16"),
        (_edit_tensors(lambda t: t["0.directions"].fill_(float("nan"))), "holds NaN"),
        (_edit_tensors(lambda t: t["0.features"].add_(1)), "digest"),
        (_edit_json(lambda d: d.update(schema_version=2)), r"schema version 2.*pip install -U peft-sae"),
        (_edit_json(lambda d: d.update(schema="peft_sae.statistics")), r"does not describe a peft_sae\.subspace"),
        (_edit_json(lambda d: d.update(sites=[])), "has no sites"),
        (_edit_json(lambda d: d.pop("sites")), "malformed"),
        (_edit_json(lambda d: d.pop("layout")), "malformed"),
        (_edit_json(lambda d: d.pop("digest")), r"None\.\.\. was written"),
        (_edit_json(lambda d: d["settings"].update(top_k=7)), "digest"),
        (_edit_json(lambda d: d["layout"].update(blocks="model.h")), "digest"),
        (_edit_json(lambda d: d["layout"].update(roles=3)), "block layout is malformed"),
        (_edit_json(lambda d: _site(d).update(rank=2**40)), "impossible sizes"),
        (_edit_json(lambda d: _site(d).update(rank=0)), "impossible sizes"),
        (_edit_json(lambda d: _site(d).update(rank=float("inf"))), "malformed"),
        (_edit_json(lambda d: _site(d).update(features=10**9)), "impossible sizes"),
        (_edit_json(lambda d: _site(d)["sae"].update(d_in=2**40)), "impossible sizes"),
        (_edit_json(lambda d: _site(d)["sae"].update(hook_name="hook_embed")), "digest"),
        (_edit_json(lambda d: _site(d)["tokens"].pop()), "has tokens for 5 of 6 features"),
        (_edit_json(lambda d: _site(d).update(tokens=6)), "malformed"),
        (_edit_json(lambda d: _site(d)["sae"].update(digest=None)), "'digest' .* of a wrong type"),
    ],
)
def test_damaged_folders_are_artifact_errors(subspace, tmp_path, damage, message):
    subspace.save_pretrained(tmp_path / "s")
    damage(tmp_path / "s")
    with pytest.raises(ArtifactError, match=message):
        Subspace.from_pretrained(tmp_path / "s")


def test_parts_of_two_subspaces_do_not_pass_as_one(llama, tokenizer, saes, subspace, tmp_path):
    other = build_subspace(
        llama, tokenizer, saes=saes, aligned=UNALIGNED, unaligned=ALIGNED, top_k=6, variance=0.8, progress=False
    )
    assert other.digest != subspace.digest
    subspace.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "two")
    (tmp_path / "two" / "subspace.safetensors").replace(tmp_path / "one" / "subspace.safetensors")
    with pytest.raises(ArtifactError, match="digest"):
        Subspace.from_pretrained(tmp_path / "one")


def test_features_table_has_a_row_per_feature(subspace):
    table = subspace.features
    assert list(table.columns) == [
        "block",
        "hook_name",
        "sae",
        "rank",
        "feature",
        "score",
        "q_value",
        "aligned_mean",
        "unaligned_mean",
        "aligned_rate",
        "unaligned_rate",
        "tokens",
        "weight",
        "neuronpedia",
    ]
    assert len(table) == 12
    assert table["block"].tolist() == [0] * 6 + [2] * 6
    assert table["rank"].tolist() == [1, 2, 3, 4, 5, 6] * 2
    site = subspace.sites[1]
    second = table[table["hook_name"] == "blocks.2.hook_resid_pre"]
    assert second["feature"].tolist() == site.features.tolist()
    assert second["score"].tolist() == site.scores.tolist()
    assert second["q_value"].tolist() == site.q_values.tolist()
    assert (table["q_value"] < 1).all()
    assert second["tokens"].tolist() == [list(tokens) for tokens in site.tokens]
    assert table["neuronpedia"].isna().all()


def test_weight_is_the_share_of_a_direction_in_the_basis(subspace):
    table = subspace.features
    for site in subspace.sites:
        rest = site.directions - site.directions @ site.basis.T @ site.basis
        expected = 1 - rest.square().sum(dim=1)
        weights = table[table["hook_name"] == site.sae.hook_name]["weight"].tolist()
        torch.testing.assert_close(torch.tensor(weights), expected, rtol=0, atol=1e-5)


def test_a_folder_reads_nothing_from_outside(subspace, tmp_path):
    subspace.save_pretrained(tmp_path / "elsewhere")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "subspace").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"subspace\.json' is a link that leads out of .*adapter'"):
        Subspace.from_pretrained(tmp_path / "adapter")
    (tmp_path / "name").symlink_to(tmp_path / "elsewhere")  # what somebody names may be anywhere
    assert Subspace.from_pretrained(tmp_path / "name").digest == subspace.digest


def test_table_links_to_neuronpedia(llama, tokenizer):
    saes = load_saes(make_sae(neuronpedia_id="my-model/1-res"))
    built = build_subspace(llama, tokenizer, saes=saes, aligned=ALIGNED, unaligned=UNALIGNED, top_k=2, progress=False)
    table = built.features
    expected = [f"https://www.neuronpedia.org/my-model/1-res/{feature}" for feature in table["feature"]]
    assert table["neuronpedia"].tolist() == expected


def _rewrite(subspace, **changes):
    """The Subspace with one site changed, with a digest that fits: a file by somebody who knows the format."""
    from dataclasses import replace

    return replace(subspace, sites=(replace(subspace.sites[0], **changes), *subspace.sites[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda site: {"features": site.features - 1 - site.features.min()}, "not distinct features of the SAE"),
        (lambda site: {"features": torch.zeros_like(site.features)}, "not distinct features of the SAE"),
        (lambda site: {"basis": 2 * site.basis}, "is not orthonormal"),
        (lambda site: {"directions": torch.zeros_like(site.directions)}, "does not consist of its features"),
    ],
)
def test_a_subspace_that_belongs_together_but_makes_no_sense_is_refused(subspace, tmp_path, change, message):
    _rewrite(subspace, **change(subspace.sites[0])).save_pretrained(tmp_path / "out")

    with pytest.raises(ArtifactError, match=message):
        Subspace.from_pretrained(tmp_path / "out")


def test_two_sites_at_one_hook_point_are_refused(subspace, tmp_path):
    from dataclasses import replace

    replace(subspace, sites=(subspace.sites[0],) * 2).save_pretrained(tmp_path / "out")

    with pytest.raises(ArtifactError, match="two sites have the same hook point"):
        Subspace.from_pretrained(tmp_path / "out")


def test_a_short_description_is_printed(subspace):
    assert repr(subspace).startswith("Subspace(blocks.0.hook_resid_post: 6 features, rank ")
