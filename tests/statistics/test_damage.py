"""Statistics with all parts in a file, and files that someone has changed, digest and all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_sae import FeatureStatistics
from peft_sae.artifact import digest
from peft_sae.errors import ArtifactError
from peft_sae.statistics import Measures
from peft_sae.statistics.parts import HISTOGRAM_BINS
from tests.tiny import make_model

from .dense import assert_same_sums, collect, double_saes, make_texts

ALL = Measures(histograms=True, covariance=True, top_examples=3, sample=4)


@pytest.fixture(scope="module")
def statistics(tokenizer):
    data = {"aligned": make_texts(9, 0), "unaligned": make_texts(2, 1)}
    return collect(make_model().double(), tokenizer, data, double_saes(), measures=ALL)


def test_every_part_survives_a_file_bit_by_bit(statistics, tmp_path):
    statistics.save_pretrained(tmp_path / "s")
    read = FeatureStatistics.from_pretrained(tmp_path / "s")
    assert digest(*read.to_tensors()) == digest(*statistics.to_tensors())
    assert_same_sums(read, statistics, rtol=0)
    assert read.settings == statistics.settings
    assert read.of("unaligned")[0].top.examples[:, 2].unique().tolist() == [-1]
    read.save_pretrained(tmp_path / "again")
    for name in ("statistics.json", "statistics.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "s" / name).read_bytes()


def _change(folder, tensors=None, sizes=None):
    """Change tensors and sizes of the first SAE's aligned class, and make the digest fit again."""
    arrays = load_file(folder / "statistics.safetensors")
    description = json.loads((folder / "statistics.json").read_text())
    for name, change in (tensors or {}).items():
        arrays[f"0.0.{name}"] = change(arrays[f"0.0.{name}"].clone())
    if sizes is not None:
        sizes(description["sizes"]["aligned"][0])
    description.pop("digest")
    description["digest"] = digest(arrays, description)
    save_file(arrays, folder / "statistics.safetensors")
    (folder / "statistics.json").write_text(json.dumps(description))


def _put(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


def _set(part, **numbers):
    return lambda sizes: sizes["parts"][part].update(numbers)


def test_the_helper_of_these_tests_leaves_a_readable_file(statistics, tmp_path):
    statistics.save_pretrained(tmp_path / "s")
    count = statistics.of("aligned")[0].count
    _change(tmp_path / "s", {"maximum": _put(3, 99.0)}, lambda sizes: sizes.update(count=count + 1))
    moments = FeatureStatistics.from_pretrained(tmp_path / "s").of("aligned")[0]
    assert (moments.count, moments.maximum[3].item()) == (count + 1, 99)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"histogram.cells": _put(-1, 64 * HISTOGRAM_BINS)}, "histogram with impossible cells"),
        ({"histogram.cells": _put(0, -1)}, "histogram with impossible cells"),
        ({"histogram.cell_counts": _put(0, 0)}, "histogram with impossible cells"),
        ({"histogram.cells": lambda cells: cells[[0, 0, *range(2, len(cells))]]}, "histograms of other numbers"),
        ({"sample.ends": lambda ends: ends - 1}, "sample with impossible rows"),
        ({"sample.ends": _put(-1, 2**40)}, "sample with impossible rows"),
        ({"sample.ends": _put(0, 2**40)}, "sample with impossible rows"),
        ({"sample.ends": _put(0, -1)}, "sample with impossible rows"),
        (
            {"total": _put(3, 7e9)},
            "sums that do not go with firing counts and maxima, sums that do not",
        ),
        ({"total_squares": _put(3, -1.0)}, "negative sums of squares"),
        ({"example_squares": lambda squares: -squares}, "negative sums of squares"),
        ({"example_squares": lambda squares: 0 * squares}, "sums that do not go with sums of squares"),
        ({"example_products": lambda products: 99 * products}, "sums that do not go with sums of squares"),
        ({"fired": lambda fired: 0 * fired}, "sums that do not go with firing counts and maxima"),
        ({"top.values": lambda values: values.flip(1)}, "most active texts out of order"),
        ({"top.examples": _put((0, 0), 9)}, "most active texts that were not read"),
        ({"top.examples": _put((0, 0), -2)}, "most active texts that were not read"),
        ({"sample.examples": _put(0, 9)}, "a sample of texts that were not read"),
        (
            {"raw.products": lambda products: products + products.abs().triu(1)},
            "products of raw activations that",
        ),
        ({"raw.total": lambda total: 99 * total}, "products of raw activations that are none"),
        ({"sample.features": _put(0, 64)}, "features that the SAE does not have"),
        ({"sample.features": _put(0, -1)}, "features that the SAE does not have"),
        ({"sample.values": _put(0, float("inf"))}, "holds NaN or infinity"),
        ({"top.values": _put((0, 0), float("nan"))}, "holds NaN or infinity"),
        ({"top.values": lambda values: values[:, :2].contiguous()}, r"F32 \[64, 2\], and F32 \[64, 3\] was expected"),
        ({"raw.total": lambda total: total[:-1]}, r"F64 \[31\], and F64 \[32\] was expected"),
        ({"raw.products": lambda products: products[:-1]}, r"F64 \[31, 32\], and F64 \[32, 32\] was expected"),
    ],
)
def test_damaged_tensors_of_parts_are_artifact_errors(statistics, tmp_path, tensors, message):
    statistics.save_pretrained(tmp_path / "s")
    _change(tmp_path / "s", tensors)
    with pytest.raises(ArtifactError, match=message):
        FeatureStatistics.from_pretrained(tmp_path / "s")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (_set("histogram", d_sae=65), "histogram is of 65 features, and the SAE has 64"),
        (_set("histogram", d_sae=2**31), "histogram is of 2147483648 features"),
        (_set("histogram", d_sae=2**31 + 1), "impossible sizes"),
        (_set("top", d_sae=3), "top is of 3 features"),
        (_set("top", number=2**31), r"was expected"),
        (_set("histogram", cells=2**31), r"was expected"),
        (_set("raw", covariance=0), r"unexpected ones \['0\.0\.raw\.products'\]"),
        (_set("raw", d_in=2**31), r"raw is of width 2147483648, and the SAE's is 32"),
        (_set("sample", entries=-1), "impossible counts"),
        (_set("sample", rows=2**61), "impossible sizes"),
        (_set("sample", limit=1.5), "impossible counts"),
        (_set("sample", limit=None), "impossible counts"),
        (_set("sample", limit=1), "a sample that is larger than its limit"),
        (lambda sizes: sizes.update(count_squares=sizes["count"]), "impossible numbers of observations and texts"),
        (_set("top", number=True), "impossible counts"),
        (lambda sizes: sizes["parts"].update(other={"d_sae": 64}), "malformed.*'other'"),
        (lambda sizes: sizes["parts"].update(histogram=[1]), "malformed"),
        (lambda sizes: sizes["parts"]["sample"].pop("rows"), "malformed.*'rows'"),
        (lambda sizes: sizes["parts"]["histogram"].pop("d_sae"), "malformed.*'d_sae'"),
        (lambda sizes: sizes["parts"].pop("top"), "unexpected ones"),
        (lambda sizes: sizes.pop("parts"), "malformed.*'parts'"),
        (lambda sizes: sizes.update(examples=0), "impossible counts"),
        (lambda sizes: sizes.update(count_squares=-1), "impossible counts"),
        (lambda sizes: sizes.update(count="9"), "impossible counts"),
    ],
)
def test_damaged_sizes_of_parts_are_artifact_errors(statistics, tmp_path, sizes, message):
    statistics.save_pretrained(tmp_path / "s")
    _change(tmp_path / "s", sizes=sizes)
    with pytest.raises(ArtifactError, match=message):
        FeatureStatistics.from_pretrained(tmp_path / "s")


def test_raw_moments_of_another_width_are_an_artifact_error(statistics, tmp_path):
    statistics.save_pretrained(tmp_path / "s")
    shorter = {"raw.total": lambda total: total[:5], "raw.products": lambda products: products[:5, :5].contiguous()}
    _change(tmp_path / "s", shorter, _set("raw", d_in=5))
    with pytest.raises(ArtifactError, match="raw is of width 5, and the SAE's is 32"):
        FeatureStatistics.from_pretrained(tmp_path / "s")


@pytest.mark.parametrize("entry", ["settings", "versions", "saes", "labels", "sizes"])
@pytest.mark.parametrize("value", [None, 3, "text", [], [[]]])
def test_nonsense_in_the_description_is_an_artifact_error(statistics, tmp_path, entry, value):
    statistics.save_pretrained(tmp_path / "s")
    path = tmp_path / "s" / "statistics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    with pytest.raises(ArtifactError):
        FeatureStatistics.from_pretrained(tmp_path / "s")


def test_another_digest_is_an_artifact_error(statistics, tmp_path):
    statistics.save_pretrained(tmp_path / "s")
    arrays = load_file(tmp_path / "s" / "statistics.safetensors")
    arrays["1.1.sample.values"] = torch.nextafter(arrays["1.1.sample.values"], torch.tensor(9.0))
    save_file(arrays, tmp_path / "s" / "statistics.safetensors")
    with pytest.raises(ArtifactError, match="has not the digest that was written with it"):
        FeatureStatistics.from_pretrained(tmp_path / "s")
