import numpy as np
import pytest
import torch

from peft_sae.errors import SelectionError
from peft_sae.subspace.site import principal_basis, unit_rows


def _directions(count, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Decaying scales make the spectrum uneven, so that a share of the variance cuts it.
    scale = 0.7 ** torch.arange(width, dtype=torch.float64)
    return unit_rows(torch.randn(count, width, generator=generator, dtype=torch.float64) * scale, "test")


@pytest.mark.parametrize("variance", [0.3, 0.8, 0.99, 1.0])
@pytest.mark.parametrize(("count", "width"), [(12, 30), (30, 12), (1, 5), (64, 64)])
def test_basis_is_orthonormal_and_made_of_the_directions(count, width, variance):
    directions = _directions(count, width)
    basis, coefficients = principal_basis(directions, variance)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(coefficients @ directions, basis, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variance", [0.3, 0.5, 0.8, 0.9, 0.99])
def test_rank_is_the_smallest_that_keeps_the_share_of_variance(variance):
    directions = _directions(20, 16)
    values = np.linalg.svd(directions.numpy(), compute_uv=False) ** 2
    shares = np.cumsum(values) / values.sum()
    basis, _ = principal_basis(directions, variance)
    kept = float((directions @ basis.T).square().sum() / directions.square().sum())
    assert len(basis) == int(np.argmax(shares >= variance)) + 1
    assert kept == pytest.approx(shares[len(basis) - 1])
    assert kept >= variance
    assert shares[len(basis) - 2] < variance or len(basis) == 1


def test_basis_spans_the_principal_directions_in_order():
    directions = _directions(20, 16)
    basis, _ = principal_basis(directions, 0.9)
    _, _, right = np.linalg.svd(directions.numpy())
    overlap = np.abs(basis.numpy() @ right[: len(basis)].T)
    np.testing.assert_allclose(overlap, np.eye(len(basis)), atol=1e-6)


def test_spans_are_nested():
    directions = _directions(20, 16)
    small, large = (principal_basis(directions, variance)[0] for variance in (0.5, 0.95))
    assert len(small) < len(large)
    torch.testing.assert_close(small @ large.T @ large, small, rtol=0, atol=1e-6)


def test_whole_variance_keeps_the_full_rank():
    directions = _directions(10, 16)
    basis, _ = principal_basis(directions, 1.0)
    assert len(basis) == np.linalg.matrix_rank(directions.numpy()) == 10
    torch.testing.assert_close(directions @ basis.T @ basis, directions, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", range(1, 11))
def test_share_that_is_met_exactly_needs_no_further_vector(rank):
    orthonormal, _ = torch.linalg.qr(_directions(16, 10))
    assert len(principal_basis(orthonormal.T, rank / 10)[0]) == rank
    assert len(principal_basis(orthonormal.T, rank / 10 - 0.01)[0]) == rank


def test_rounding_of_the_share_adds_no_vector():
    assert 0.1 + 0.2 > 0.3
    assert len(principal_basis(torch.eye(10, dtype=torch.float64), 0.1 + 0.2)[0]) == 3


def test_repeated_and_opposite_directions_collapse():
    one = _directions(3, 16)
    basis, coefficients = principal_basis(torch.cat([one, one, -one]), 1.0)
    assert basis.shape == (3, 16)
    assert coefficients.shape == (3, 9)
    torch.testing.assert_close(one @ basis.T @ basis, one, rtol=0, atol=1e-6)


def test_directions_that_differ_by_rounding_collapse():
    one = _directions(3, 16)
    rounded = unit_rows(one + 4e-6 * _directions(3, 16, seed=1), "test")
    assert len(principal_basis(torch.cat([one, rounded]), 1.0)[0]) == 3


@pytest.mark.parametrize("copies", [1, 5])
def test_single_direction_is_its_own_basis(copies):
    one = _directions(1, 16)
    basis, coefficients = principal_basis(one.repeat(copies, 1), 0.8)
    torch.testing.assert_close(basis, one, rtol=0, atol=1e-12)
    torch.testing.assert_close(coefficients, torch.full((1, copies), 1 / copies, dtype=torch.float64))


def test_signs_do_not_depend_on_the_solver(monkeypatch):
    directions = _directions(12, 16)
    basis, coefficients = principal_basis(directions, 0.9)
    assert bool((coefficients.sum(dim=1) > 0).all())
    svd = torch.linalg.svd

    def flipped(matrix, full_matrices):
        left, values, right = svd(matrix, full_matrices=full_matrices)
        return -left, values, -right

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    again, _ = principal_basis(directions, 0.9)
    torch.testing.assert_close(again, basis, rtol=0, atol=1e-9)


def test_order_of_the_directions_does_not_change_the_basis():
    directions = _directions(12, 16)
    basis, _ = principal_basis(directions, 0.9)
    shuffled, _ = principal_basis(directions[torch.randperm(12, generator=torch.Generator().manual_seed(1))], 0.9)
    torch.testing.assert_close(shuffled, basis, rtol=0, atol=1e-6)


def test_unit_rows_have_unit_length_in_double_precision():
    rows = unit_rows(torch.tensor([[3.0, 4.0], [1e-12, 0.0]]).bfloat16(), "test")
    assert rows.dtype == torch.float64
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [1.0, 0.0]], dtype=torch.float64))


def test_direction_of_length_zero_is_an_error():
    with pytest.raises(SelectionError, match=r"number \[1\] of 'my-sae' .* length zero.*Choose other features"):
        unit_rows(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "my-sae")
