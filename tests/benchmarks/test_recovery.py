import math

import pytest
import torch

from benchmarks.recovery.world import decoder_error, make_world, nearest_features, noised_sae, subspace_error


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2])
def test_the_error_of_two_planes_is_the_sine_of_their_angle(angle):
    plane = torch.eye(4, dtype=torch.float64)[:2]
    turned = plane.clone()
    turned[1] = torch.tensor([0.0, math.cos(angle), math.sin(angle), 0.0])
    assert subspace_error(plane, turned) == pytest.approx(math.sin(angle), abs=1e-7)


@pytest.mark.parametrize("rank", [2, 5])
def test_the_floor_is_the_error_where_one_direction_is_shared(rank):
    axes = torch.eye(3 * rank, dtype=torch.float64)
    truth, other = axes[:rank], torch.cat([axes[:1], axes[rank : 2 * rank - 1]])
    assert subspace_error(truth, other) == pytest.approx(math.sqrt(rank - 1))
    assert subspace_error(truth, axes[rank : 2 * rank]) == pytest.approx(math.sqrt(rank))


@pytest.mark.parametrize("error", [0.0, 0.01, 0.3])
def test_a_noised_decoder_is_as_far_from_the_concepts_as_was_asked(error):
    world = make_world(32, 64, 4, seed=1)
    sae = noised_sae(world, error, seed=2)
    distances = (sae.W_dec.data.double() - world.dictionary.double()).norm(dim=1)
    torch.testing.assert_close(distances, torch.full_like(distances, error), atol=2e-6, rtol=1e-4)
    assert decoder_error(world, sae.W_dec.data) == pytest.approx(error, abs=1e-3)


def test_concepts_are_crowded_and_the_task_is_some_of_them():
    world = make_world(16, 64, 5, seed=0)
    assert world.dictionary.shape == (64, 16)
    assert len(set(world.task.tolist())) == 5
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(world.truth @ world.truth.T, identity)
    inside = world.dictionary[world.task].double() @ world.truth.T
    torch.testing.assert_close(inside.norm(dim=1), torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_nearest_features_are_the_concepts_wherever_the_decoder_has_them():
    world = make_world(16, 40, 5, seed=0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    rows = 3 * world.dictionary[order]  # of any length
    assert order[nearest_features(world, rows)].tolist() == world.task.tolist()
