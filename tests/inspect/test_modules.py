import pytest
import torch

from peft_sae import inspect_adapter
from peft_sae.inspect.base import open_skeleton

from .dense import train


def _row_space(matrix, tolerance=1e-6):
    _, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return right[values > tolerance * values[0]]


def _start(trained, name, subspace, hook):
    """The basis behind the norm: what injection puts into the factor, computed another way."""
    site = next(site for site in subspace.sites if site.sae.hook_name == hook)
    directions = site.basis.double()
    if trained.side(name) == "read":
        return _row_space(trained.met(name, directions))
    gain = trained.gain(name)  # what is written as d / g arrives as d behind a post-norm
    return _row_space(directions if gain is None else directions / gain)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_number_is_that_of_the_dense_update(tmp_path, family, frozen):
    trained = train(tmp_path, family, freeze_basis=frozen)
    subspace = trained.model.peft_config["default"].own_subspace()
    table = inspect_adapter(trained.adapter).modules.set_index("module")
    deltas = trained.deltas
    assert set(table.index) == set(deltas)
    for name, delta in deltas.items():
        row, side = table.loc[name], trained.side(name)
        values = torch.linalg.svdvals(delta)
        count = row["r"]
        assert row["side"] == side
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert row["singular_values"] == pytest.approx(values[:count].tolist(), rel=1e-4, abs=1e-6)
        assert row["rank"] == int((values > 1e-5 * values[0]).sum())
        assert row["drift"] == pytest.approx(1 - row["in_basis"])
        start = _start(trained, name, subspace, row["hook_name"])
        inside = delta @ start.T if side == "read" else start @ delta
        assert row["basis"] == len(start)
        assert row["in_basis"] == pytest.approx(float(inside.square().sum() / delta.square().sum()), rel=1e-5)
        assert row["chance"] == pytest.approx(len(start) / start.shape[1])
        assert 0 < row["in_random"] < 1
        if frozen:
            assert row["drift"] == pytest.approx(0, abs=1e-6)
            assert row["largest_angle"] == pytest.approx(0, abs=1e-2)
            continue
        cosines = torch.linalg.svdvals(start @ _row_space(delta if side == "read" else delta.T).T).clamp(max=1)
        angles = torch.rad2deg(torch.acos(cosines)).sort().values
        assert row["angles"] == pytest.approx(angles.tolist(), abs=1e-2)
        assert row["largest_angle"] == pytest.approx(float(angles.max()), abs=1e-2)
        assert row["mean_angle"] == pytest.approx(float(angles.mean()), abs=1e-2)
        assert row["random_mean_angle"] > row["mean_angle"]


def test_the_random_control_has_on_average_what_chance_gives(tmp_path):
    trained = train(tmp_path)
    found = [inspect_adapter(trained.adapter, seed=seed).modules for seed in range(20)]
    measured = torch.tensor([table["in_random"].astype(float).mean() for table in found])
    assert float(measured.mean()) == pytest.approx(found[0]["chance"].mean(), rel=0.15)
    assert len(set(measured.tolist())) == 20


def test_an_untrained_adapter_has_moved_nowhere(tmp_path):
    trained = train(tmp_path, noise=0.0)
    found = inspect_adapter(trained.adapter)
    assert found.modules["norm"].max() == 0
    assert found.modules["in_basis"].isna().all()
    assert found.modules["largest_angle"].max() == pytest.approx(0, abs=1e-3)
    assert found.summary["drift"] is None
    assert "NaN" not in found.to_json()


def test_the_relative_norm_needs_the_weights(tmp_path):
    trained = train(tmp_path)
    assert inspect_adapter(trained.adapter).modules["relative_norm"].isna().all()
    found = inspect_adapter(trained.model).modules.set_index("module")
    for name, delta in trained.deltas.items():
        base = trained.model.get_base_model().get_submodule(name).get_base_layer().weight
        assert found.loc[name, "relative_norm"] == pytest.approx(float(delta.norm() / base.double().norm()), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3", "opt", "qwen3", "gpt_neox"])
def test_folder_and_model_in_memory_give_the_same(tmp_path, family):
    trained = train(tmp_path, family)
    first, second = inspect_adapter(trained.adapter), inspect_adapter(trained.model)
    for column in ("module", "side", "hook_name", "r", "rank", "basis"):
        assert first.modules[column].tolist() == second.modules[column].tolist()
    for column in ("norm", "in_basis", "in_random", "largest_angle"):
        assert first.modules[column].tolist() == pytest.approx(second.modules[column].tolist(), rel=1e-5, abs=1e-4)
    assert first.features["share"].tolist() == pytest.approx(second.features["share"].tolist(), rel=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_skeleton_has_the_norms_and_no_other_weights(tmp_path, sharded):
    from tests.tiny import make_model

    model = make_model("gemma2")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB" if sharded else "5GB")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists() is sharded
    skeleton = open_skeleton(tmp_path / "base")
    values = model.state_dict()
    for name, parameter in skeleton.named_parameters():
        assert parameter.shape == values[name].shape
        if "norm" in name:
            assert torch.equal(parameter, values[name])
        else:
            assert parameter.untyped_storage().nbytes() == 4
    assert not any(tensor.is_meta for tensor in (*skeleton.parameters(), *skeleton.buffers()))
