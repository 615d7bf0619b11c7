"""A transcoder through all stages: read at one place, directions at another."""

import pytest
import torch
from peft import get_peft_model

from peft_sae import SaeSubspaceConfig, Subspace, build_subspace, collect_statistics, load_saes
from peft_sae.errors import MismatchError
from tests.tiny import ALIGNED, UNALIGNED, make_model, make_sae, make_tokenizer


@pytest.fixture
def transcoder():
    return make_sae("blocks.1.ln2.hook_normalized", kind="jumprelu_skip_transcoder")


def build(model, saes, **settings):
    given = {"aligned": ALIGNED, "unaligned": UNALIGNED, "top_k": 6, "progress": False, **settings}
    return build_subspace(model, make_tokenizer(), saes=saes, **given)


def test_its_basis_is_what_the_mlp_writes(transcoder, tmp_path):
    model = make_model("gemma2")
    build(model, load_saes(transcoder)).save_pretrained(tmp_path / "subspace")
    subspace = Subspace.from_pretrained(tmp_path / "subspace")

    (site,) = subspace.sites
    assert (site.sae.hook_name, site.sae.hook_name_in) == ("blocks.1.hook_mlp_out", "blocks.1.ln2.hook_normalized")
    expected = torch.nn.functional.normalize(transcoder.W_dec.detach()[site.features], dim=-1)
    torch.testing.assert_close(site.directions, expected, rtol=0, atol=1e-6)
    config = SaeSubspaceConfig(subspace=subspace, r="auto", target_modules=["down_proj"], task_type="CAUSAL_LM")
    record = get_peft_model(model, config).peft_config["default"].basis_record["modules"]
    assert {(entry["side"], entry["hook_name"]) for entry in record.values()} == {("write", "blocks.1.hook_mlp_out")}
    with pytest.raises(MismatchError, match=r"can get no basis from SAEs at \['mlp_out'\] alone"):
        get_peft_model(
            make_model("gemma2"), SaeSubspaceConfig(subspace=subspace, r="auto", target_modules=["gate_proj"])
        )


def test_its_statistics_are_those_of_where_it_reads(transcoder):
    """The same weights read elsewhere give other means: the place is not that of the directions."""
    elsewhere = make_sae("blocks.1.hook_resid_mid", kind="jumprelu_skip_transcoder")
    model, tokenizer = make_model("gemma2"), make_tokenizer()
    means = [
        collect_statistics(model, tokenizer, {"aligned": ALIGNED}, load_saes(sae), progress=False)
        .moments["aligned"][0]
        .mean
        for sae in (transcoder, elsewhere)
    ]
    assert (means[0] - means[1]).abs().max() > 1e-2


def test_a_transcoder_and_an_sae_of_the_same_directions_are_one_too_many(transcoder):
    with pytest.raises(MismatchError, match=r"same hook point blocks\.1\.hook_mlp_out"):
        load_saes([transcoder, make_sae("blocks.1.hook_mlp_out", seed=1)])


def test_an_sae_on_the_mlps_input_gives_its_readers_a_basis_and_no_tokens():
    model = make_model("gemma2")
    subspace = build(model, load_saes(make_sae("blocks.1.mlp.hook_in")))

    assert subspace.sites[0].tokens == ((),) * 6
    config = SaeSubspaceConfig(
        subspace=subspace, r="auto", layer_map="exact", layers_to_transform=[1], target_modules=["gate_proj", "up_proj"]
    )
    for layer in get_peft_model(model, config).modules():
        if hasattr(layer, "lora_A"):
            rows = layer.lora_A["default"].weight.detach()
            torch.testing.assert_close(rows, subspace.sites[0].basis, rtol=1e-4, atol=1e-5)
