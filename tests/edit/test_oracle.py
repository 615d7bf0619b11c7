"""Edits beside dense float64 computations with whole matrices, on several architectures."""

import logging

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from peft_sae import edit_adapter, load_saes
from peft_sae.edit import read_edits
from tests.edit.dense import ROLES, met, oracle, projection, updates, with_updates
from tests.tiny import make_model, make_sae

IDS = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))
FAMILIES = sorted(ROLES)
KINDS = ["SAE_SUBSPACE", "LORA"]
# Of two SAEs whose decoder rows are neither orthogonal nor of unit length.
EDITED = {"0:3": 0.0, "0:10": 0.5, "2:4": -2.0, "blocks.2.hook_resid_pre:5": 1.0}


def decoder_rows(saes, names):
    hooks = {handle.identity.hook_name: handle for handle in saes}
    blocks = {str(handle.identity.site.block): handle for handle in saes}
    rows = []
    for name in names:
        place, feature = name.split(":")
        rows.append(hooks.get(place, blocks.get(place)).decoder[int(feature)].double())
    return torch.stack(rows)


def logits(model, dtype=torch.float64):
    with torch.no_grad():
        return model.to(dtype).eval()(IDS).logits


def check_logits(adapter, family, dense, tmp_path):
    """The edited adapter, loaded by PEFT as any other, answers as a model with the dense updates."""
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = logits(PeftModel.from_pretrained(base, adapter))
    expected = logits(with_updates(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), dense))
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_removing_is_the_projection_off_the_features(trained, tmp_path, saes, family, kind):
    adapter = trained(family, kind=kind)
    names = ["0:3", "0:10", "2:4"]

    edited = updates(edit_adapter(adapter, tmp_path / "edited", remove=names, saes=saes))

    before, base = updates(adapter), make_model(family)
    assert edited.keys() == before.keys()
    assert {met(family, base, name, torch.ones(1, 32))[0] for name in before} == {"read", "write"}
    expected = {}
    for name, matrix in before.items():
        side, rows = met(family, base, name, decoder_rows(saes, names))
        seen = edited[name] @ normalize(rows).T if side == "read" else normalize(rows) @ edited[name]
        assert float(seen.norm(dim=0 if side == "read" else 1).max()) < 1e-6 * matrix.norm()
        span = projection(rows)
        expected[name] = matrix - (matrix @ span if side == "read" else span @ matrix)
        torch.testing.assert_close(edited[name], expected[name], rtol=0, atol=1e-6 * float(matrix.norm()))
        assert float((expected[name] - matrix).norm()) > 0.05 * matrix.norm()  # it was there before
        record = read_edits(tmp_path / "edited")[0]["modules"][name]
        assert record["energy_removed"] == pytest.approx(1 - float((expected[name].norm() / matrix.norm()) ** 2))
        assert record["left"] < 1e-6
    check_logits(tmp_path / "edited", family, expected, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_is_exact_for_features_that_overlap_and_nothing_for_what_is_orthogonal(
    trained, tmp_path, saes, family, kind
):
    adapter = trained(family, kind=kind)

    edited = updates(edit_adapter(adapter, tmp_path / "edited", scale=EDITED, saes=saes))

    before, base = updates(adapter), make_model(family)
    factors = torch.tensor(list(EDITED.values())).double()
    expected = {}
    for name, matrix in before.items():
        side, rows = met(family, base, name, decoder_rows(saes, EDITED))
        rows = normalize(rows)
        assert float((rows @ rows.T - torch.eye(4)).abs().max()) > 0.05
        old, new = (matrix, edited[name]) if side == "read" else (matrix.T, edited[name].T)
        torch.testing.assert_close(new @ rows.T, old @ rows.T * factors, rtol=0, atol=1e-6 * float(matrix.norm()))
        across = torch.eye(32) - projection(rows)
        torch.testing.assert_close(new @ across, old @ across, rtol=0, atol=1e-6 * float(matrix.norm()))
        expected[name] = oracle(matrix, side, rows, factors)
        torch.testing.assert_close(edited[name], expected[name], rtol=0, atol=1e-6 * float(matrix.norm()))
    check_logits(tmp_path / "edited", family, expected, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_is_the_projection_on_the_features(trained, tmp_path, saes, family):
    adapter = trained(family)
    names = ["0:3", "0:10", "2:4"]

    edited = updates(edit_adapter(adapter, tmp_path / "edited", keep=names, saes=saes))

    base, expected = make_model(family), {}
    for name, matrix in updates(adapter).items():
        side, rows = met(family, base, name, decoder_rows(saes, names))
        span = projection(rows)
        expected[name] = matrix @ span if side == "read" else span @ matrix
        torch.testing.assert_close(edited[name], expected[name], rtol=0, atol=1e-6 * float(matrix.norm()))
    check_logits(tmp_path / "edited", family, expected, tmp_path)


def test_scaling_by_zero_is_removing(trained, tmp_path, saes):
    adapter = trained()

    first = updates(edit_adapter(adapter, tmp_path / "first", remove=["0:3", "2:4"], saes=saes))
    second = updates(edit_adapter(adapter, tmp_path / "second", scale={"0:3": 0, "2:4": 0.0}, saes=saes))
    third = updates(edit_adapter(adapter, tmp_path / "third", remove=["0:3"], scale={"2:4": 1e-12}, saes=saes))

    for name in first:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], third[name], rtol=0, atol=1e-6)  # by another way


def test_features_of_the_subspace_need_no_saes_and_the_model_can_be_given(trained, tmp_path):
    adapter = trained(ranks={"blocks.1.hook_resid_post": 4, "blocks.2.hook_resid_mid": 2})
    names = ["blocks.1.hook_resid_post:2", "2:0"]

    by_folder = updates(edit_adapter(adapter, tmp_path / "a", remove=names))
    by_model = updates(edit_adapter(adapter, tmp_path / "b", remove=names, model=make_model()))
    other_folder = updates(edit_adapter(adapter, tmp_path / "c", remove=names, model=tmp_path / "base"))

    for name in by_folder:
        assert torch.equal(by_folder[name], by_model[name])
        assert torch.equal(by_folder[name], other_folder[name])


def test_linearly_dependent_directions_can_be_removed_together(trained, tmp_path):
    sae = make_sae("blocks.1.hook_resid_post")
    sae.W_dec.data[2] = sae.W_dec.data[0] - 3 * sae.W_dec.data[1]
    saes, adapter = load_saes([sae]), trained(kind="LORA")

    edited = updates(edit_adapter(adapter, tmp_path / "edited", remove=["1:0", "1:1", "1:2"], saes=saes))
    halved = updates(edit_adapter(adapter, tmp_path / "half", scale={f"1:{i}": 0.5 for i in range(3)}, saes=saes))

    for name, matrix in updates(adapter).items():
        side, rows = met("llama", make_model(), name, decoder_rows(saes, ["1:0", "1:1"]))
        span = projection(rows)
        gone = matrix @ span if side == "read" else span @ matrix
        torch.testing.assert_close(edited[name], matrix - gone, rtol=0, atol=1e-6 * float(matrix.norm()))
        torch.testing.assert_close(halved[name], matrix - gone / 2, rtol=0, atol=1e-6 * float(matrix.norm()))


def test_a_direction_that_a_layernorm_takes_off_is_met_by_no_reader(trained, tmp_path):
    sae = make_sae("blocks.1.hook_resid_post")
    sae.W_dec.data[0] = 1.0
    adapter = trained("gpt2", kind="LORA")

    edited = updates(edit_adapter(adapter, tmp_path / "edited", remove=["1:0"], saes=load_saes([sae])))

    for name, matrix in updates(adapter).items():
        if name.endswith(("c_attn", "c_fc")):
            assert torch.equal(edited[name], matrix)
        else:
            assert float(edited[name].sum(0).abs().max()) < 1e-5
            assert float(matrix.sum(0).abs().max()) > 0.1


def test_removing_everything_leaves_zeros_and_says_so(trained, tmp_path, saes, caplog):
    adapter = trained(kind="LORA", target_modules=["q_proj"])

    with caplog.at_level(logging.WARNING):
        edited = updates(edit_adapter(adapter, tmp_path / "edited", remove=[f"0:{i}" for i in range(40)], saes=saes))

    assert all(float(matrix.abs().max()) == 0 for matrix in edited.values())
    assert "Nothing is left of the updates of 3 of 3 modules" in caplog.text


def test_a_feature_of_the_heads_counts_in_its_own_block(trained, tmp_path):
    saes = load_saes([make_sae("blocks.1.attn.hook_z"), make_sae("blocks.2.hook_resid_post", seed=3)])
    adapter = trained(kind="LORA", target_modules=["o_proj"])
    heads, stream = (normalize(handle.decoder[7:8].double()) for handle in saes)

    edited = updates(edit_adapter(adapter, tmp_path / "edited", remove=["1:7"], scale={"2:7": 0.5}, saes=saes))

    for name, matrix in updates(adapter).items():
        left = matrix - 0.5 * stream.T @ (stream @ matrix)
        if ".1." in name:
            left = left - left @ heads.T @ heads
        torch.testing.assert_close(edited[name], left, rtol=0, atol=1e-6)


def test_a_feature_of_the_mlps_input_is_met_behind_the_norm(trained, tmp_path):
    saes = load_saes([make_sae("blocks.1.mlp.hook_in"), make_sae("blocks.2.hook_resid_post", seed=3)])
    adapter = trained(kind="LORA", target_modules=["gate_proj"])
    inside, stream = (handle.decoder[7:8].double() for handle in saes)

    edited = updates(edit_adapter(adapter, tmp_path / "edited", remove=["1:7", "2:7"], saes=saes))

    for name, matrix in updates(adapter).items():
        rows = met("llama", make_model(), name, stream)[1]
        span = projection(torch.cat([rows, inside]) if ".1." in name else rows)
        torch.testing.assert_close(edited[name], matrix - matrix @ span, rtol=0, atol=1e-6)


def test_modules_that_meet_no_kept_feature_lose_their_update(trained, tmp_path, caplog):
    saes = load_saes([make_sae("blocks.1.attn.hook_z")])
    adapter = trained(kind="LORA", target_modules=["o_proj", "down_proj"])

    edited = updates(edit_adapter(adapter, tmp_path / "edited", keep=["1:7"], saes=saes))

    kept = [name for name, matrix in edited.items() if float(matrix.abs().max()) > 0]
    assert kept == ["model.layers.1.self_attn.o_proj"]
    assert "Nothing is left of the updates of 5 of 6 modules" in caplog.text


@pytest.mark.parametrize(
    "fields", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}]
)
def test_scaling_of_lora_does_not_matter_to_what_is_removed(trained, tmp_path, saes, fields):
    adapter = trained(kind="LORA", **fields)

    edited = updates(edit_adapter(adapter, tmp_path / "edited", remove=["0:3"], saes=saes))

    for name, matrix in edited.items():
        side, rows = met("llama", make_model(), name, decoder_rows(saes, ["0:3"]))
        seen = matrix @ normalize(rows).T if side == "read" else normalize(rows) @ matrix
        assert float(seen.norm()) < 1e-6 * matrix.norm()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_the_head_reads_behind_the_last_norm(trained, tmp_path, saes):
    adapter = trained(kind="LORA", target_modules=["lm_head"])
    model = make_model()

    edited = updates(edit_adapter(adapter, tmp_path / "edited", remove=["2:3"], saes=saes))

    row = normalize(decoder_rows(saes, ["2:3"]) * model.model.norm.weight.double())
    before = updates(adapter)["lm_head"]
    torch.testing.assert_close(edited["lm_head"], before - before @ row.T @ row, rtol=0, atol=1e-6)
