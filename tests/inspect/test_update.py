import math

import pytest
import torch

from peft_sae.inspect.features import own_parts
from peft_sae.inspect.update import LowRankUpdate, principal_angles

NORMAL = torch.Generator().manual_seed(0)


def _normal(*shape):
    return torch.randn(*shape, generator=NORMAL, dtype=torch.float64)


def _orthonormal(count, width):
    return torch.linalg.qr(_normal(width, count)).Q.T


@pytest.mark.parametrize("shape", [(7, 5, 3), (4, 9, 4), (6, 6, 1), (3, 4, 8)])
def test_numbers_are_those_of_the_dense_matrix(shape):
    out, inside, rank = shape
    update = LowRankUpdate("m", _normal(rank, inside), _normal(out, rank), 0.7)
    dense = 0.7 * update.b @ update.a
    values = torch.linalg.svdvals(dense)
    found = update.singular_values
    torch.testing.assert_close(found[: len(values)], values[: len(found)], rtol=1e-12, atol=1e-12)
    assert update.norm == pytest.approx(float(dense.norm()), rel=1e-12)
    assert update.rank == int(torch.linalg.matrix_rank(dense))
    rows, columns = _normal(5, inside), _normal(5, out)
    torch.testing.assert_close(update.energy_along(rows, "read"), (rows @ dense.T).square().sum(1))
    torch.testing.assert_close(update.energy_along(columns, "write"), (columns @ dense).square().sum(1))


def test_rank_counts_directions_not_rows():
    a = _normal(4, 9)
    a[3] = a[0] + 1e-9 * a[1]
    update = LowRankUpdate("m", a, _normal(8, 4), 1.0)
    assert update.rank == 3
    assert len(update.factor_rows("read")) == 3
    assert len(update.factor_rows("write")) == 4
    nothing = LowRankUpdate("m", a, torch.zeros(8, 4).double(), 1.0)
    assert (nothing.rank, nothing.norm, len(nothing.factor_rows("write"))) == (0, 0.0, 0)


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 0.3, 30.0, 60.0, 89.9, 90.0])
def test_principal_angles_are_those_of_a_rotation(degrees):
    basis = _orthonormal(6, 11)
    angle = math.radians(degrees)
    first, second = basis[:2], torch.stack([math.cos(angle) * basis[0] + math.sin(angle) * basis[2], basis[1]])
    found = principal_angles(first, _orthonormal(2, 2) @ second)
    assert found.tolist() == pytest.approx([0.0, degrees], rel=1e-9, abs=1e-9)


def test_principal_angles_of_spaces_of_different_size():
    basis = _orthonormal(8, 11)
    inside = _orthonormal(3, 5) @ basis[:5]
    assert principal_angles(inside, basis[:5]).tolist() == pytest.approx([0, 0, 0], abs=1e-7)
    assert principal_angles(basis[:5], inside).tolist() == pytest.approx([0, 0, 0], abs=1e-7)
    assert principal_angles(basis[:2], basis[5:8]).tolist() == pytest.approx([90, 90])


@pytest.mark.parametrize("count", [1, 4, 9])
def test_own_parts_are_orthogonal_to_all_others(count):
    rows = torch.nn.functional.normalize(_normal(count, 12))
    parts = own_parts(rows)
    for index, part in enumerate(parts):
        others = torch.cat([rows[:index], rows[index + 1 :]])
        assert float((others @ part).abs().max()) < 1e-9 if count > 1 else True
        left = rows[index] - others.T @ torch.linalg.lstsq(others.T, rows[index]).solution if count > 1 else rows[index]
        torch.testing.assert_close(part, left / left.norm(), rtol=1e-7, atol=1e-9)


def test_a_direction_that_others_make_up_has_no_part_of_its_own():
    rows = _normal(4, 12)
    rows = torch.nn.functional.normalize(torch.cat([rows, rows[:1] + rows[1:2]]))
    parts = own_parts(rows)
    assert parts.norm(dim=1).tolist() == pytest.approx([0, 0, 1, 1, 0], abs=1e-9)
    assert float((parts[2] @ rows[[0, 1, 3, 4]].T).abs().max()) < 1e-9
    wide = own_parts(torch.nn.functional.normalize(_normal(15, 12)))  # more directions than dimensions
    assert float(wide.abs().max()) == 0
