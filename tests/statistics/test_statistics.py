import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_sae import FeatureStatistics, load_saes
from peft_sae.artifact import digest
from peft_sae.errors import ArtifactError, DataError
from peft_sae.statistics import FeatureMoments
from tests.tiny import make_sae

D_SAE = 64


def _activations(tokens, seed):
    return torch.randn(tokens, D_SAE, generator=torch.Generator().manual_seed(seed)).relu()


@pytest.fixture
def statistics():
    saes = tuple(
        load_saes(make_sae(hook))[0].identity for hook in ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
    )
    moments = {
        label: tuple(FeatureMoments.of(_activations(9, seed + index)) for index in range(2))
        for seed, label in [(0, "aligned"), (5, "unaligned")]
    }
    return FeatureStatistics(saes, moments, {"tokens": "all", "examples": {"aligned": 9, "unaligned": 9}})


def _tensors(statistics):
    return {
        f"{label}.{index}.{name}": getattr(moment, name)
        for label, moments in statistics.moments.items()
        for index, moment in enumerate(moments)
        for name in ("total", "total_squares", "fired", "maximum")
    }


@pytest.mark.parametrize("parts", [[30], [1, 29], [10, 7, 13]])
def test_sums_of_parts_give_the_moments_of_the_whole(parts):
    whole = _activations(30, 0)
    first, *others = [FeatureMoments.of(part) for part in whole.split(parts)]
    moments = sum(others, first)
    exact = whole.double()
    assert moments.count == 30
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments.variance, exact.var(0, correction=0), rtol=1e-5, atol=1e-6)
    assert torch.equal(moments.firing_rate, (exact > 0).double().mean(0))
    assert torch.equal(moments.maximum, exact.amax(0))


def test_half_precision_activations_are_summed_in_single_precision():
    ones = torch.ones(5000, 1, dtype=torch.bfloat16)
    assert FeatureMoments.of(ones).total.item() == 5000


def test_variance_is_never_negative():
    assert FeatureMoments.of(torch.full((7, 1), 0.1)).variance.item() >= 0


def test_round_trip_is_bit_exact(statistics, tmp_path):
    statistics.save_pretrained(tmp_path / "s")
    read = FeatureStatistics.from_pretrained(tmp_path / "s")
    assert digest(_tensors(read)) == digest(_tensors(statistics))
    assert (read.saes, read.settings, read.versions) == (statistics.saes, statistics.settings, statistics.versions)
    assert [m.count for m in read.of("aligned")] == [9, 9]
    assert "torch" in read.versions


def test_missing_class_lists_the_classes(statistics):
    with pytest.raises(DataError, match=r"no class 'harmful'.*\['aligned', 'unaligned'\]"):
        statistics.of("harmful")


def _edit_json(change):
    def edit(folder):
        data = json.loads((folder / "statistics.json").read_text())
        change(data)
        (folder / "statistics.json").write_text(json.dumps(data))

    return edit


def _edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "statistics.safetensors")
        change(tensors)
        save_file(tensors, folder / "statistics.safetensors")

    return edit


def _truncate(folder):
    path = folder / "statistics.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "damaged or truncated"),
        (lambda folder: (folder / "statistics.safetensors").unlink(), "folder is incomplete"),
        (lambda folder: (folder / "statistics.json").unlink(), "no peft_sae.statistics in"),
        (_edit_tensors(lambda t: t.pop("0.1.fired")), r"lacks the tensors \['0.1.fired'\]"),
        (_edit_tensors(lambda t: t.update(more=torch.zeros(1))), r"unexpected ones \['more'\]"),
        (_edit_tensors(lambda t: t.update({"0.0.total": torch.zeros(3).double()})), r"F64 \[3\], and F64 \[64\]"),
        (_edit_tensors(lambda t: t.update({"0.0.total": torch.zeros(64)})), r"F32 \[64\], and F64 \[64\]"),
        (_edit_tensors(lambda t: t["0.0.total"].fill_(float("nan"))), "holds NaN"),
        (_edit_json(lambda d: d.update(schema_version=2)), "schema version 2"),
        (_edit_json(lambda d: d.update(schema="peft_sae.subspace")), "does not describe a peft_sae.statistics"),
        (_edit_json(lambda d: d.pop("sizes")), "malformed.*Collect the statistics again"),
        (_edit_json(lambda d: d["sizes"]["aligned"].pop()), "do not fit each other"),
        (_edit_json(lambda d: d["sizes"]["aligned"][1].update(count=0)), "impossible counts"),
        (_edit_json(lambda d: d["saes"][0].update(d_sae=0)), "cannot exist"),
        (_edit_json(lambda d: d["saes"][0].update(d_in=True)), "'d_in' .* wrong type"),
        (_edit_json(lambda d: d["saes"][0].pop("digest")), "identity needs the entries"),
    ],
)
def test_damaged_folders_are_artifact_errors(statistics, tmp_path, damage, message):
    statistics.save_pretrained(tmp_path / "s")
    damage(tmp_path / "s")
    with pytest.raises(ArtifactError, match=message):
        FeatureStatistics.from_pretrained(tmp_path / "s")
