import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peft_sae.tuner.basis import NormGain, fill_rows, measure_norm, orthonormal_rows, through_norm
from tests.tiny import make_model


def randomise(norm, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return norm


@pytest.mark.parametrize("width", [32, 33])
@pytest.mark.parametrize(
    ("norm_cls", "gain", "centers"),
    [
        (LlamaRMSNorm, lambda norm: norm.weight, False),
        (Gemma2RMSNorm, lambda norm: 1 + norm.weight, False),
        (nn.LayerNorm, lambda norm: norm.weight, True),
        (nn.RMSNorm, lambda norm: norm.weight, False),
    ],
)
def test_measured_gain_is_the_norms_own(norm_cls, gain, centers, width):
    norm = randomise(norm_cls(width))

    measured = measure_norm(norm, width)

    expected = gain(norm).detach().double()
    ratio = measured.gain / expected
    torch.testing.assert_close(ratio, ratio.mean().expand(width), rtol=1e-4, atol=0)
    assert measured.centers is centers


def test_measuring_leaves_no_trace_and_skips_meta():
    assert measure_norm(nn.LayerNorm(8, device="meta"), 8) is None


def test_measured_gain_in_bfloat16_is_the_stored_gain():
    norm = randomise(LlamaRMSNorm(32)).bfloat16()

    torch.testing.assert_close(measure_norm(norm, 32).gain, norm.weight.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm_cls", [LlamaRMSNorm, Gemma2RMSNorm, nn.LayerNorm])
def test_read_directions_are_the_norms_derivative_up_to_rescaling(norm_cls):
    """The Jacobian of a norm at x, applied to d, is the carried direction minus a multiple of the output."""
    norm = randomise(norm_cls(32)).double()
    generator = torch.Generator().manual_seed(1)
    x, d = torch.randn(2, 32, generator=generator, dtype=torch.float64)

    carried = through_norm(d[None], measure_norm(norm, 32), "read")[0]

    change = torch.autograd.functional.jvp(norm, x, d)[1]
    unbiased = (norm(x) - norm(-x)).detach() / 2
    plane = torch.linalg.qr(torch.stack([carried, unbiased], dim=1))[0]
    torch.testing.assert_close(plane @ (plane.T @ change), change, rtol=1e-6, atol=1e-6)


def test_write_directions_come_out_of_a_post_norm_along_the_feature():
    norm = randomise(Gemma2RMSNorm(32)).double()
    d = torch.randn(1, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    written = through_norm(d, measure_norm(norm, 32), "write")

    assert torch.nn.functional.cosine_similarity(norm(written), d).item() == pytest.approx(1, abs=1e-9)


def test_channels_that_a_post_norm_silences_are_left_alone():
    gain = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)

    written = through_norm(torch.ones(1, 3), NormGain(gain, centers=False), "write")

    assert written.tolist() == [[1.0, 0.0, 0.5]]


def test_orthonormal_rows_keep_nested_spans_and_drop_dependent_rows():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, 16, generator=generator, dtype=torch.float64)
    directions = torch.cat([directions[:2], directions[:1] * -3, directions[2:], torch.zeros(1, 16).double()])

    rows = orthonormal_rows(directions)

    assert rows.shape == (4, 16)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.dot(rows[0], directions[0]) > 0
    for count in range(1, 3):
        projected = (directions[:count] @ rows[:count].T) @ rows[:count]
        torch.testing.assert_close(projected, directions[:count])


@pytest.mark.parametrize("spread", [0, 2, 4])
def test_orthonormal_rows_stay_so_for_nearly_dependent_directions(spread):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 64, generator=generator, dtype=torch.float64)
    directions = common + 10.0**-spread * torch.randn(6, 64, generator=generator, dtype=torch.float64)

    rows = orthonormal_rows(directions)

    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-10)
    exact = torch.linalg.qr(directions.T)[0].T
    assert len(rows) == 6
    torch.testing.assert_close((rows @ exact.T).abs().diagonal(), torch.ones(len(rows)).double(), rtol=0, atol=1e-6)


def test_fill_is_orthonormal_orthogonal_and_reproducible():
    rows = torch.linalg.qr(torch.randn(24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0].T
    state = torch.random.get_rng_state()

    filled = torch.cat([rows, fill_rows(rows, 19, seed="a")])

    torch.testing.assert_close(filled @ filled.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.equal(fill_rows(rows, 3, seed="a"), fill_rows(rows, 3, seed="a"))
    assert not torch.allclose(fill_rows(rows, 3, seed="a"), fill_rows(rows, 3, seed="b"))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("width", [8, 32, 768])
def test_dependent_rows_take_nothing_from_those_behind_them(width):
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, width, generator=generator, dtype=torch.float64)
    near = a + 1e-8 * torch.randn(width, generator=generator, dtype=torch.float64)
    for rows in ([a, a, b, c], [a, b, a + b, c], [a, near, b, c], [a, 0 * a, b, c]):
        found = orthonormal_rows(torch.stack(rows))
        assert found.shape == (3, width)
        torch.testing.assert_close(found @ found.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
        for row in rows:
            assert (row - (row @ found.T) @ found).norm() < 1e-6 * a.norm()


def test_rows_beyond_the_width_and_rows_of_nothing():
    many = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert orthonormal_rows(many).shape == (4, 4)
    assert orthonormal_rows(torch.zeros(2, 4, dtype=torch.float64)).shape == (0, 4)
    assert orthonormal_rows(torch.zeros(0, 4, dtype=torch.float64)).shape == (0, 4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_gain_of_a_norm_in_bfloat16_has_no_rounding_of_its_own(family):
    name = "transformer.h.0.ln_1" if family == "gpt2" else "model.layers.0.input_layernorm"
    low = make_model(family).to(torch.bfloat16)
    exact = make_model(family).to(torch.bfloat16).float()
    torch.testing.assert_close(
        measure_norm(low.get_submodule(name), 32).gain,
        measure_norm(exact.get_submodule(name), 32).gain,
        rtol=1e-6,
        atol=0,
    )
    assert low.get_submodule(name).weight.dtype is torch.bfloat16
