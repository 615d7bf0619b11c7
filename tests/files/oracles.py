"""What a right load is, from the bytes of the files and without the package's readers."""

from __future__ import annotations

import dataclasses
import json
import math
import typing

import torch

from .mutations import parse

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "C64": torch.complex64,
}
_ROUNDING = 1e-3  # a change that is lost in rounding is none


def read_tensors(content: bytes) -> dict[str, torch.Tensor]:
    header, data = parse(content)
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert 0 <= begin <= end <= len(data)
        flat = torch.tensor(list(data[begin:end]), dtype=torch.uint8).view(DTYPES[entry["dtype"]])
        found[name] = flat.reshape(entry["shape"])
    return found


def read_json(path):
    return json.loads(path.read_bytes())


def same(first, second) -> bool:
    """Equal, and of equal type, in depth."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(same(one, two) for one, two in zip(first, second, strict=True))
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first):
        return math.isnan(second)
    return type(first) is type(second) and first == second


def check_finite(tensors):
    for name, tensor in tensors.items():
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), name


def check_subspace(folder, subspace):
    """The Subspace is what its files say, and can be one."""
    data, tensors = read_json(folder / "subspace.json"), read_tensors((folder / "subspace.safetensors").read_bytes())
    check_finite(tensors)
    count = 0
    for prefix, key, sites in (("", "sites", subspace.sites), ("protected.", "protected", subspace.protected)):
        assert len(data[key]) == len(sites)
        for index, (entry, site) in enumerate(zip(data[key], sites, strict=True)):
            assert same(entry["sae"], site.sae.to_dict())
            assert same(entry["tokens"], site.tokens)
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}{index}.")}
            count += len(own)
            for name, tensor in own.items():
                found = getattr(site, name.rpartition(".")[2])
                assert found.dtype == tensor.dtype
                assert torch.equal(found, tensor)
            _check_site(data, entry, site)
            if key == "sites":
                _check_basis(entry, site)
        assert len({site.sae.hook_name for site in sites}) == len(sites)
    assert count == len(tensors)
    assert same(data["layout"], subspace.layout.to_dict())
    for name in ("model", "settings", "versions"):
        assert same(data[name], dict(getattr(subspace, name)))
    assert type(data["model"]["hidden_size"]) is int
    assert type(data["model"]["num_hidden_layers"]) is int
    assert len(subspace.features) == sum(len(site.features) for site in subspace.sites)
    assert len(subspace.protected_features) == sum(len(site.features) for site in subspace.protected)


def _check_site(data, entry, site):
    ids = site.features.tolist()
    assert len(ids) == entry["features"] == len(site.tokens) == len(set(ids)) > 0
    assert min(ids) >= 0
    assert max(ids) < site.sae.d_sae
    assert 0 <= site.sae.site.block < data["model"]["num_hidden_layers"]
    assert site.directions.shape == (len(ids), site.sae.d_in)
    assert torch.allclose(site.directions.norm(dim=1), torch.ones(len(ids)), atol=1e-2)


def _check_basis(entry, site):
    assert site.basis.shape == (entry["rank"], site.sae.d_in)
    assert torch.allclose(site.basis @ site.basis.T, torch.eye(entry["rank"]), atol=1e-2)
    assert torch.allclose(site.coefficients @ site.directions, site.basis, atol=1e-2)
    for name in ("q_values", "aligned_rates", "unaligned_rates"):
        found = getattr(site, name)
        assert bool(((found >= 0) & (found <= 1)).all()), name


def check_statistics(data, tensors, statistics, *, complete=True):
    """The statistics are what their files say, and can be true."""
    check_finite(tensors)
    assert list(statistics.moments) == data["labels"]
    assert same(data["saes"], [sae.to_dict() for sae in statistics.saes])
    for name in ("settings", "versions"):
        assert same(data[name], dict(getattr(statistics, name)))
    found, _ = statistics.to_tensors()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    for label, moments in statistics.moments.items():
        for sizes, sae, one in zip(data["sizes"][label], statistics.saes, moments, strict=True):
            assert (one.count, one.examples, one.count_squares) == (
                sizes["count"],
                sizes["examples"],
                sizes["count_squares"],
            )
            _check_moments(one, sae)
            _check_parts(
                one, sae, statistics.settings.get("examples", {}).get(label, math.inf) if complete else math.inf
            )


def _check_moments(one, sae):
    count, examples = one.count, one.examples
    assert 1 <= examples <= count
    assert count**2 <= examples * one.count_squares
    assert one.count_squares <= count**2
    assert one.total.shape == (sae.d_sae,)
    slack = 1 + _ROUNDING
    assert bool(((one.fired >= 0) & (one.fired <= count)).all())
    assert bool((one.maximum >= 0).all())
    assert bool((one.total_squares >= 0).all())
    assert bool((one.example_squares >= 0).all())
    # A feature that never fires has sums of zero, and a mean is within the maximum.
    assert bool((one.total_squares[one.fired == 0] == 0).all())
    assert bool((one.total <= one.fired * one.maximum * slack + 1e-30).all())
    # Cauchy and Schwarz, over observations and over examples.
    assert bool((one.total.square() <= one.fired * one.total_squares * slack + 1e-30).all())
    assert bool((one.total.square() <= examples * one.example_squares * slack + 1e-30).all())
    assert bool((one.example_squares <= count * one.total_squares * slack + 1e-30).all())
    assert bool((one.example_products.square() <= one.count_squares * one.example_squares * slack + 1e-30).all())
    for name in ("mean", "variance", "firing_rate"):
        assert bool(torch.isfinite(getattr(one, name)).all())


def _check_parts(one, sae, examples):
    assert examples >= one.examples
    if one.histogram is not None:
        assert torch.equal(one.histogram.counts.sum(dim=1), one.fired)
        assert bool((one.histogram.counts >= 0).all())
    if one.raw is not None:
        assert one.raw.count >= 1
        if one.raw.products is not None:
            diagonal = one.raw.products.diagonal()
            assert torch.allclose(
                one.raw.products, one.raw.products.T, rtol=_ROUNDING, atol=_ROUNDING * float(diagonal.max())
            )
            assert bool((one.raw.total.square() <= one.raw.count * diagonal * (1 + _ROUNDING) + 1e-30).all())
    if one.top is not None:
        there = one.top.examples >= 0
        assert bool(((one.top.examples >= -1) & (one.top.examples < examples)).all())
        assert bool((one.top.positions[there] >= 0).all())
        assert bool((one.top.values.diff(dim=1) <= 0).all())
    if one.sample is not None:
        assert len(one.sample.examples) <= one.sample.limit
        assert bool(((one.sample.examples >= 0) & (one.sample.examples < examples)).all())
        assert one.sample.dense(sae.d_sae).shape == (len(one.sample.examples), sae.d_sae)


def check_config(data, config):
    """A configuration has the values of its file, and numbers that can be reckoned with."""
    assert str(getattr(config.peft_type, "value", config.peft_type)) == data.get("peft_type", "SAE_SUBSPACE")
    found = config.to_dict()
    for name, value in data.items():
        if name in ("peft_type", "subspace") or name not in found:
            continue
        given = sorted(found[name]) if isinstance(found[name], set) else found[name]
        value = sorted(set(value)) if isinstance(found[name], set) else value
        if name == "loftq_config" or (
            isinstance(value, dict) and (name.endswith("_config") or not isinstance(given, dict))
        ):
            continue  # classes of PEFT
        assert same(given, value) or (name == "peft_version" and value is None), name
    if type(config).__name__ != "SaeSubspaceConfig":
        return
    assert config.r == "auto" or (type(config.r) is int and config.r > 0)
    alphas = [config.lora_alpha, *config.alpha_pattern.values()]
    assert all(type(alpha) in (int, float) and math.isfinite(float(alpha)) for alpha in alphas)
    assert all(type(rank) is int and rank > 0 for rank in config.rank_pattern.values())
    assert 0 <= config.lora_dropout <= 1
    for name in (
        "use_rslora",
        "use_dora",
        "fan_in_fan_out",
        "lora_bias",
        "freeze_basis",
        "norm_gain",
        "inference_mode",
    ):
        assert type(getattr(config, name)) is bool, name
    assert isinstance(config.target_modules, (str, set, type(None)))
    assert config.megatron_core in (None, "megatron.core")


def check_job(data, job):
    """A job has the values of its file, and defaults where it has none."""
    hints = typing.get_type_hints(type(job))
    for entry in dataclasses.fields(job):
        value = getattr(job, entry.name)
        if entry.name in data:
            assert same(_numbers(data[entry.name]), _numbers(value)), entry.name
        hint = str(hints[entry.name])
        if hint == "<class 'str'>":
            assert type(value) is str
        if hint == "<class 'int'>":
            assert type(value) is int
        if hint == "<class 'float'>":
            assert type(value) in (int, float)
            assert math.isfinite(value)


def _numbers(value):
    """YAML 1.1 takes 1e5 for text."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    try:
        return float(value) if isinstance(value, str) and value[:1] in "+-0123456789" else value
    except ValueError:
        return value
