"""Control bases against dense computations on the raw activations."""

import pytest
import torch

from peft_sae import Subspace, build_subspace, collect_statistics
from peft_sae.errors import ConfigError, MismatchError, SelectionError
from peft_sae.statistics import Measures
from peft_sae.subspace.controls import control_subspace
from tests.tiny import ALIGNED, UNALIGNED

DATA = {"aligned": ALIGNED, "unaligned": UNALIGNED}


@pytest.fixture(scope="module")
def chosen(llama, tokenizer, saes):
    return build_subspace(
        llama, tokenizer, saes=saes, aligned=ALIGNED, unaligned=UNALIGNED, top_k=6, protect=["0:3"], progress=False
    )


@pytest.fixture(scope="module")
def statistics(llama, tokenizer, saes):
    return collect_statistics(llama, tokenizer, DATA, saes, measures=Measures(covariance=True), progress=False)


@torch.no_grad()
def _raw(model, tokenizer, records, site):
    """Activations of all tokens but BOS at a residual site, float64 [tokens, width]."""
    rows = []
    for record in records:
        ids = torch.tensor([tokenizer(record["prompt"] + record["completion"])["input_ids"]])
        hidden = model(ids, output_hidden_states=True).hidden_states
        rows.append(hidden[site.block + (site.kind == "resid_post")][0, 1:].double())
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["random", "neurons", "difference_pca", "mean_difference"])
def test_shape_and_protection_are_those_of_the_original(chosen, statistics, kind, tmp_path):
    control = control_subspace(chosen, kind, statistics=statistics, seed=3)
    assert [site.sae.hook_name for site in control.sites] == [site.sae.hook_name for site in chosen.sites]
    assert [site.rank for site in control.sites] == [site.rank for site in chosen.sites]
    assert control.protected == chosen.protected
    assert control.settings["control"] == kind
    assert control.settings["like"] == chosen.digest
    for site in control.sites:
        torch.testing.assert_close(site.basis @ site.basis.T, torch.eye(site.rank), rtol=0, atol=1e-5)
    control.save_pretrained(tmp_path / kind)
    assert Subspace.from_pretrained(tmp_path / kind).digest == control.digest


def test_random_basis_depends_on_the_seed_alone(chosen):
    first, again, other = (control_subspace(chosen, "random", seed=seed).digest for seed in (0, 0, 1))
    assert first == again != other


def test_random_subspaces_are_of_a_uniform_distribution(chosen):
    """Signs of the first vector's first coordinate, which QR alone would all make the same."""
    signs = [float(control_subspace(chosen, "random", seed=seed).sites[0].basis[0, 0]) > 0 for seed in range(40)]
    assert 8 <= sum(signs) <= 32


def test_mean_difference_is_the_raw_direction_and_random_ones_across_it(chosen, statistics, llama, tokenizer):
    control = control_subspace(chosen, "mean_difference", statistics=statistics, seed=1)
    other = control_subspace(chosen, "mean_difference", statistics=statistics, seed=2)
    for site, again in zip(control.sites, other.sites, strict=True):
        means = [_raw(llama, tokenizer, records, site.sae.site).mean(0) for records in (ALIGNED, UNALIGNED)]
        direction = torch.nn.functional.normalize(means[0] - means[1], dim=0).float()
        torch.testing.assert_close(site.basis[0], direction, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again.basis[0], direction, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(site.basis[1], again.basis[1], atol=0.1)


def test_neurons_are_the_coordinates_that_differ_most(chosen, statistics, llama, tokenizer):
    control = control_subspace(chosen, "neurons", statistics=statistics)
    for site in control.sites:
        means = [_raw(llama, tokenizer, records, site.sae.site).mean(0) for records in (ALIGNED, UNALIGNED)]
        difference = means[0] - means[1]
        best = difference.abs().topk(site.rank).indices
        assert site.features.tolist() == best.tolist()
        torch.testing.assert_close(site.scores, difference[best], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(site.basis, torch.eye(32)[best])


def test_components_are_those_of_all_differences_between_the_classes(chosen, statistics, llama, tokenizer):
    control = control_subspace(chosen, "difference_pca", statistics=statistics)
    for site in control.sites:
        first, second = (_raw(llama, tokenizer, records, site.sae.site) for records in (ALIGNED, UNALIGNED))
        pairs = (first[:, None] - second[None]).reshape(-1, 32)
        _, values, axes = torch.linalg.svd(pairs, full_matrices=False)
        torch.testing.assert_close(site.scores, values[: site.rank].square() / len(pairs), rtol=1e-4, atol=1e-5)
        overlap = (axes[: site.rank] @ site.basis.double().T).abs().diagonal()
        torch.testing.assert_close(overlap, torch.ones(site.rank).double(), rtol=0, atol=1e-3)
        assert bool((site.aligned_means >= site.unaligned_means).all())


def test_what_is_missing_is_told(chosen, statistics, llama, tokenizer, saes):
    with pytest.raises(ConfigError, match=r"kind='pca' is unknown.*'difference_pca'"):
        control_subspace(chosen, "pca", statistics=statistics)
    with pytest.raises(ConfigError, match=r"'neurons' is made of raw activations. Give statistics"):
        control_subspace(chosen, "neurons")
    plain = collect_statistics(llama, tokenizer, DATA, saes, progress=False)
    with pytest.raises(SelectionError, match=r"no covariance.*Measures\(covariance=True\)"):
        control_subspace(chosen, "difference_pca", statistics=plain)
    elsewhere = collect_statistics(llama, tokenizer, DATA, saes[:1], progress=False)
    with pytest.raises(MismatchError, match=r"no raw activations at blocks\.2.*use the control 'random'"):
        control_subspace(chosen, "neurons", statistics=elsewhere)
