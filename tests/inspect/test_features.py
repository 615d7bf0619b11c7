import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_sae import SaeSubspaceConfig, inspect_adapter, load_saes
from peft_sae.errors import MismatchError
from tests.tiny import make_sae

from .dense import HOOKS, train


def _energy(trained, name, direction):
    delta, (met,) = trained.deltas[name], trained.met(name, direction[None])
    return float((delta @ met if trained.side(name) == "read" else met @ delta).square().sum())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
def test_shares_are_those_of_the_dense_update(tmp_path, family):
    trained = train(tmp_path, family)
    found = inspect_adapter(trained.adapter)
    decoders = {handle.identity.hook_name: handle.decoder for handle in trained.saes}
    near = {row.module: row.hook_name for row in found.modules.itertuples()}
    deltas = trained.deltas
    each = found.module_features.set_index(["name", "module"])["share"]
    assert set(found.features["group"]) == {"chosen"}
    for row in found.features.itertuples():
        mine = [name for name in deltas if trained.side(name) == row.side and near[name] == row.hook_name]
        energies = {name: _energy(trained, name, decoders[row.hook_name][row.feature]) for name in mine}
        total = sum(float(deltas[name].square().sum()) for name in mine)
        assert row.modules == len(mine) > 0
        assert row.share == pytest.approx(sum(energies.values()) / total, rel=1e-4)
        shares = {name: energies[name] / float(deltas[name].square().sum()) for name in mine}
        for name, share in shares.items():
            assert each[row.name, name] == pytest.approx(share, rel=1e-4, abs=1e-9)
        assert row.top_module == max(shares, key=shares.get)
        assert row.top_share == pytest.approx(max(shares.values()), rel=1e-4)
        side = 1 if row.side == "read" else 0
        chance = sum(float(deltas[name].square().sum()) / deltas[name].shape[side] for name in mine) / total
        assert row.times_chance == pytest.approx(row.share / chance, rel=1e-4)


def test_the_nearest_hook_point_is_the_one_that_gave_the_basis(tmp_path):
    trained = train(tmp_path)
    record = trained.model.peft_config["default"].basis_record["modules"]
    for row in inspect_adapter(trained.adapter).modules.itertuples():
        assert row.hook_name == record[row.module]["hook_name"]
        assert row.basis == record[row.module]["basis"]
        assert row.side == record[row.module]["side"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unique_is_what_the_span_loses_without_the_feature(tmp_path, family):
    trained = train(tmp_path, family)
    found = inspect_adapter(trained.adapter)
    near = {row.module: row.hook_name for row in found.modules.itertuples()}
    decoders = {handle.identity.hook_name: handle.decoder for handle in trained.saes}

    def inside(name, features, hook):
        met = trained.met(name, decoders[hook][features])
        basis = torch.linalg.qr(met.T).Q
        delta = trained.deltas[name] if trained.side(name) == "read" else trained.deltas[name].T
        return float((delta @ basis).square().sum())

    for row in found.features.itertuples():
        chosen = found.features.query("hook_name == @row.hook_name and side == @row.side")["feature"].tolist()
        others = [one for one in chosen if one != row.feature]
        mine = [name for name in trained.deltas if trained.side(name) == row.side and near[name] == row.hook_name]
        lost = sum(inside(name, chosen, row.hook_name) - inside(name, others, row.hook_name) for name in mine)
        total = sum(float(trained.deltas[name].square().sum()) for name in mine)
        assert row.unique == pytest.approx(lost / total, rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("factor", [0.5, -0.5])
def test_sign_says_whether_the_update_adds_to_the_base_weights(tmp_path, factor):
    """An update that is a multiple of the base weights along the features."""
    trained = train(tmp_path, targets=["q_proj", "down_proj"], noise=0.0, r=4)
    for name, module in trained.model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a, b, scale = module.lora_A["default"], module.lora_B["default"], module.scaling["default"]
            weight = module.get_base_layer().weight.detach()
            if trained.side(name) == "read":
                b.weight.data = factor / scale * weight @ torch.linalg.pinv(a.weight.detach())
            else:
                a.weight.data = factor / scale * torch.linalg.pinv(b.weight.detach()) @ weight
    found = inspect_adapter(trained.model, others=0)
    near = {row.module: row.hook_name for row in found.modules.itertuples()}
    decoders = {handle.identity.hook_name: handle.decoder for handle in trained.saes}
    base = trained.model.get_base_model()
    assert len(found.features)
    for row in found.features.itertuples():
        agreement = energy = 0.0
        for name, delta in trained.deltas.items():
            if trained.side(name) != row.side or near[name] != row.hook_name:
                continue
            (met,) = trained.met(name, decoders[row.hook_name][row.feature][None])
            weight = base.get_submodule(name).get_base_layer().weight.detach().double()
            seen = [(matrix if row.side == "read" else matrix.T) @ met for matrix in (weight, delta)]
            agreement += float(torch.cosine_similarity(*seen, dim=0) * seen[1].square().sum())
            energy += float(seen[1].square().sum())
        assert row.sign == pytest.approx(agreement / energy, abs=1e-5)
        # Of overlapping features the basis holds the main part, so the agreement is not full.
        assert row.sign * factor > 0.5 * abs(factor)
    assert inspect_adapter(trained.adapter).features["sign"].isna().all()  # no weights
    assert inspect_adapter(trained.model, saes=trained.saes).features["sign"].notna().all()  # of other features too


@pytest.mark.parametrize("kind", ["sae", "lora"])
def test_given_saes_show_all_features(tmp_path, kind):
    trained = train(tmp_path, kind=kind)
    found = inspect_adapter(trained.adapter, saes=trained.saes, others=64)
    near = {row.module: row.hook_name for row in found.modules.itertuples()}
    assert len(found.features) == 64 * 2 * 2  # features, hook points, sides
    assert found.features["share"].is_monotonic_decreasing
    chosen = found.features["group"] == "chosen"
    assert chosen.sum() == (16 if kind == "sae" else 0)
    assert found.features["unique"].notna().equals(chosen)
    for row in found.features.iloc[::9].itertuples():
        decoder = next(handle.decoder for handle in trained.saes if handle.identity.hook_name == row.hook_name)
        mine = [name for name in trained.deltas if trained.side(name) == row.side and near[name] == row.hook_name]
        energy = sum(_energy(trained, name, decoder[row.feature]) for name in mine)
        total = sum(float(trained.deltas[name].square().sum()) for name in mine)
        assert row.share == pytest.approx(energy / total, rel=1e-4)
    for (hook, side), rows in found.features.groupby(["hook_name", "side"]):
        typical = torch.tensor(rows["share"].tolist(), dtype=torch.float64).median()
        assert rows["times_typical"].tolist() == pytest.approx((rows["share"] / float(typical)).tolist()), (hook, side)
    assert inspect_adapter(trained.adapter).features["times_typical"].isna().all()
    few = inspect_adapter(trained.adapter, saes=trained.saes, others=3).features
    assert len(few) == chosen.sum() + 3 * 4
    kept = found.features[~chosen].groupby(["hook_name", "side"]).head(3)
    assert set(few.loc[few["group"] == "other", "name"]) == set(kept["name"])


def test_a_lora_without_saes_has_modules_and_no_features(tmp_path):
    trained = train(tmp_path, kind="lora", use_rslora=True, alpha_pattern={"q_proj": 3}, rank_pattern={"q_proj": 2})
    found = inspect_adapter(trained.adapter)
    assert not len(found.features)
    assert found.modules["in_basis"].isna().all()
    assert any("Give SAEs" in note for note in found.notes)
    for row in found.modules.itertuples():
        assert row.norm == pytest.approx(float(trained.deltas[row.module].norm()), rel=1e-5)


def test_protected_features_have_no_share(tmp_path):
    trained = train(tmp_path, build_protect=[f"{HOOKS[0]}:41", f"{HOOKS[1]}:17"])
    table = inspect_adapter(trained.adapter).features
    guarded = table[table["group"] == "protected"]
    assert set(guarded["feature"]) == {41, 17}
    assert guarded["share"].max() < 1e-12
    assert table[table["group"] == "chosen"]["share"].min() > 1e-4


def test_coefficients_make_the_basis(tmp_path):
    trained = train(tmp_path)
    subspace = trained.model.peft_config["default"].own_subspace()
    table = inspect_adapter(trained.adapter).coefficients
    for site in subspace.sites:
        mine = table[table["hook_name"] == site.sae.hook_name]
        matrix = mine.pivot(index="vector", columns="name", values="coefficient")
        names = [f"{site.sae.hook_name}:{feature}" for feature in site.features.tolist()]
        rebuilt = torch.tensor(matrix[names].to_numpy()) @ site.directions.double()
        torch.testing.assert_close(rebuilt, site.basis.double(), rtol=0, atol=1e-5)


def test_saes_of_other_weights_are_refused(tmp_path):
    trained = train(tmp_path)
    with pytest.raises(MismatchError, match=r"has the digest .* equal ids would be different features"):
        inspect_adapter(trained.adapter, saes=load_saes(make_sae(HOOKS[0], seed=99)))


def test_saes_of_another_width_are_refused(tmp_path):
    trained = train(tmp_path, kind="lora")
    with pytest.raises(MismatchError, match="32 wide"):
        inspect_adapter(trained.adapter, saes=load_saes(make_sae(HOOKS[0], width=16)))


def test_labels_are_shown(tmp_path):
    trained = train(tmp_path)
    name = inspect_adapter(trained.adapter).features["name"][0]
    found = inspect_adapter(trained.adapter, labels={name: "politeness", "7:7": "no such"})
    assert set(found.features.loc[found.features["label"].notna(), "name"]) == {name}


def test_an_adapter_beside_another_one_is_inspected_by_name(tmp_path):
    trained = train(tmp_path)
    expected = inspect_adapter(trained.model).modules["norm"].tolist()
    trained.model.add_adapter("other", SaeSubspaceConfig(r=2, subspace=trained.adapter, target_modules=["q_proj"]))
    trained.model.set_adapter("other")
    assert len(inspect_adapter(trained.model).modules) == 3
    assert inspect_adapter(trained.model, adapter_name="default").modules["norm"].tolist() == expected


def test_weights_that_were_changed_into_protected_directions_are_told(tmp_path):
    trained = train(tmp_path, build_protect=[f"{HOOKS[0]}:41"])
    assert not any("protected" in note for note in inspect_adapter(trained.adapter).notes)
    file = trained.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.1.self_attn.q_proj.lora_A.weight"))
    weights[name] += 0.1
    save_file(weights, file)
    (note,) = [note for note in inspect_adapter(trained.adapter).notes if "protected" in note]
    assert f"{HOOKS[0]}:41 in model.layers.1.self_attn.q_proj" in note
