import pytest
import torch

from peft_sae import build_subspace, collect_statistics, load_saes, select_features
from peft_sae.errors import ConfigError, DataError, MismatchError, SelectionError
from peft_sae.sae.placement import find_layout
from peft_sae.selection import Criteria
from peft_sae.subspace.build import subspace_from_selection
from tests.tiny import ALIGNED, UNALIGNED, make_model, make_sae

ALL = [f"0:{feature}" for feature in range(64)]


def _build(model, tokenizer, saes, **kwargs):
    settings = {"aligned": ALIGNED, "unaligned": UNALIGNED, "top_k": 6, "progress": False, **kwargs}
    return build_subspace(model, tokenizer, saes=saes, **settings)


@pytest.fixture(scope="module")
def selection(llama, tokenizer, saes):
    data = {"aligned": ALIGNED, "unaligned": UNALIGNED}
    return select_features(collect_statistics(llama, tokenizer, data, saes, progress=False), top_k=6)


def test_one_call_equals_the_three_stages(llama, tokenizer, saes, selection, subspace):
    assert subspace_from_selection(llama, tokenizer, selection, saes).digest == subspace.digest


def test_directions_are_the_unit_decoder_rows_of_the_chosen_features(saes, subspace):
    for handle, site in zip(saes, subspace.sites, strict=True):
        rows = handle.sae.W_dec.detach()[site.features]
        assert site.sae == handle.identity
        torch.testing.assert_close(site.directions, rows / rows.norm(dim=1, keepdim=True))
        torch.testing.assert_close(site.coefficients @ site.directions, site.basis, rtol=0, atol=1e-5)


def test_scores_are_the_difference_of_means(subspace):
    for site in subspace.sites:
        torch.testing.assert_close(site.scores, site.aligned_means - site.unaligned_means)
        assert bool((site.scores.abs().diff() <= 0).all())


@pytest.mark.parametrize("variance", [0.5, 1.0])
def test_variance_decides_the_rank(llama, tokenizer, saes, selection, variance):
    for site in subspace_from_selection(llama, tokenizer, selection, saes, variance=variance).sites:
        kept = float((site.directions @ site.basis.T).square().sum()) / 6
        assert kept >= variance - 1e-6
        assert site.rank == 6 if variance == 1 else site.rank < 6


def test_sites_come_in_the_order_of_their_blocks(llama, tokenizer):
    saes = load_saes([make_sae("blocks.2.hook_resid_post"), make_sae("blocks.0.attn.hook_z", seed=1)])
    built = _build(llama, tokenizer, saes[::-1])
    assert [site.sae.site.block for site in built.sites] == [0, 2]


def test_subspace_records_where_it_comes_from(llama, subspace):
    assert subspace.layout == find_layout(llama)
    assert subspace.model["model_type"] == "llama"
    assert subspace.settings["selector"] == "mean_difference"
    assert (subspace.settings["variance"], subspace.settings["top_k"]) == (0.8, 6)
    assert subspace.settings["statistics"]["examples"] == {"aligned": 2, "unaligned": 2}
    assert {"torch", "peft", "peft_sae", "sae_lens"} <= set(subspace.versions)


def test_tokens_are_those_that_the_decoder_rows_promote(llama, tokenizer, subspace):
    unembedding, gain = llama.lm_head.weight.detach(), llama.model.norm.weight.detach()
    for site in subspace.sites:
        for direction, tokens in zip(site.directions, site.tokens, strict=True):
            best = (unembedding[: len(tokenizer)] @ (gain * direction)).argsort(descending=True)[:8]
            assert list(tokens) == [tokenizer.decode([int(token)]) for token in best]


def test_features_of_the_heads_and_models_without_tokenizer_have_no_tokens(llama, tokenizer, saes, selection):
    heads = load_saes(make_sae("blocks.1.attn.hook_z"))
    assert _build(llama, tokenizer, heads).sites[0].tokens == ((),) * 6
    assert subspace_from_selection(llama, None, selection, saes).sites[0].tokens == ((),) * 6


def test_unembedding_behind_a_projection_promotes_no_tokens(tokenizer):
    model = make_model("opt")
    config = type(model.config)(**{**model.config.to_dict(), "word_embed_proj_dim": 16})
    projected = type(model)(config)
    assert projected.get_output_embeddings().weight.shape[-1] == 16
    assert _build(projected, tokenizer, load_saes(make_sae())).sites[0].tokens == ((),) * 6


def test_selection_of_other_saes_is_refused(llama, tokenizer, saes, selection):
    others = load_saes([make_sae("blocks.0.hook_resid_post", seed=8), make_sae("blocks.2.hook_resid_pre", seed=9)])
    with pytest.raises(MismatchError, match=r"made with SAE 'sae/blocks\.0\.hook_resid_post' .* not among the given"):
        subspace_from_selection(llama, tokenizer, selection, others)
    with pytest.raises(MismatchError, match="not among the given"):
        subspace_from_selection(llama, tokenizer, selection, saes[:1])


def test_saes_of_another_model_are_refused_before_anything_runs(tokenizer):
    with pytest.raises(MismatchError, match="width 16"):
        _build(make_model(), tokenizer, load_saes(make_sae(width=16)))


def test_selection_made_on_a_deeper_model_is_refused(llama, tokenizer, saes, selection):
    shallow = type(llama)(type(llama.config)(**{**llama.config.to_dict(), "num_hidden_layers": 2}))
    with pytest.raises(MismatchError, match="block 2 does not exist"):
        subspace_from_selection(shallow, tokenizer, selection, saes)


@pytest.mark.parametrize("variance", [0, -0.1, 1.01, float("nan")])
def test_variance_out_of_range_is_an_error(llama, tokenizer, saes, variance):
    with pytest.raises(ConfigError, match=r"is no share. Use a value in \(0, 1\]"):
        _build(llama, tokenizer, saes, variance=variance)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"aligned": []}, DataError, "The aligned data set is empty"),
        ({"unaligned": ALIGNED}, SelectionError, "No feature of .* differs"),
        ({"criteria": Criteria(exclude=ALL)}, SelectionError, r"is left: .*'excluded': 64.* fail the criteria"),
        ({"selector": "best"}, SelectionError, "'best' is unknown"),
        ({"tokens": "answer"}, ConfigError, "tokens='answer' is unknown"),
    ],
)
def test_errors_of_the_stages_come_through(llama, tokenizer, saes, change, error, message):
    with pytest.raises(error, match=message):
        _build(llama, tokenizer, saes, **change)


def test_feature_without_a_direction_is_an_error(llama, tokenizer):
    sae = make_sae()
    sae.W_dec.data.zero_()
    with pytest.raises(SelectionError, match="length zero"):
        _build(llama, tokenizer, load_saes(sae))


def test_features_are_protected_by_name(llama, tokenizer, saes, subspace):
    built = _build(llama, tokenizer, saes, protect=["0:7", "blocks.2.hook_resid_pre:3", "0:9", "0:7"])
    assert built.protected_features["name"].tolist() == [
        "blocks.0.hook_resid_post:7",
        "blocks.0.hook_resid_post:9",
        "blocks.2.hook_resid_pre:3",
    ]
    rows = saes[0].sae.W_dec.detach()[[7, 9]]
    torch.testing.assert_close(built.protected[0].directions, rows / rows.norm(dim=1, keepdim=True))
    assert all(len(tokens) == 8 for tokens in built.protected[0].tokens)


def test_a_feature_on_both_lists_is_protected_and_told(llama, tokenizer, saes, subspace, caplog):
    best = int(subspace.sites[0].features[0])
    built = _build(llama, tokenizer, saes, protect=[f"0:{best}"])
    assert f"Features [{best}] at blocks.0.hook_resid_post are chosen and protected" in caplog.text
    assert best not in built.sites[0].features.tolist()
    assert len(built.sites[0].features) == 5
    with pytest.raises(SelectionError, match=r"All features chosen at .* are protected"):
        _build(llama, tokenizer, saes, top_k=1, protect=[f"0:{best}"])


def test_features_are_protected_by_a_contrast_of_texts(llama, tokenizer, saes):
    """What differs most between the two sets is protected: the same as the selector finds in them."""
    first, second = ["red red red", "red sun"], ["blue blue blue", "blue sun"]
    built = _build(llama, tokenizer, saes, protect=(first, second), protect_top_k=3)
    statistics = collect_statistics(llama, tokenizer, {"aligned": first, "unaligned": second}, saes, progress=False)
    for site, chosen in zip(built.protected, select_features(statistics, top_k=3).sites, strict=True):
        assert torch.equal(site.features, chosen.features)


def test_protection_alone_makes_a_subspace(llama, tokenizer, saes, tmp_path):
    built = subspace_from_selection(llama, tokenizer, None, saes, protect=["2:5"])
    assert not built.sites
    assert built.model["model_type"] == "llama"
    built.save_pretrained(tmp_path)
    assert type(built).from_pretrained(tmp_path).digest == built.digest
    with pytest.raises(ConfigError, match="would be empty"):
        subspace_from_selection(llama, tokenizer, None, saes)


@pytest.mark.parametrize(
    ("protect", "error", "message"),
    [
        (["0:64"], SelectionError, r"feature 64, and the SAE at blocks.0.hook_resid_post has 64 \(ids 0 to 63\)"),
        (["1:3"], SelectionError, r"an SAE at '1', and there are SAEs at \['blocks.0"),
        (["blocks.0.hook_resid_pst:3"], SelectionError, "Did you mean 'blocks.0.hook_resid_post'"),
        (["refusal"], SelectionError, "'refusal' names no feature"),
        ("0:3", ConfigError, "is one text"),
    ],
)
def test_protecting_what_is_not_there_is_refused_before_the_long_work(llama, tokenizer, saes, protect, error, message):
    with pytest.raises(error, match=message):
        _build(llama, tokenizer, saes, aligned=["red"] * 10**6, protect=protect)


@pytest.mark.parametrize(
    "broken", [{"aligned": "no.jsonl"}, {"unaligned": "no.jsonl"}, {"protect": (["a"], "no.jsonl")}]
)
def test_a_file_that_is_not_there_is_told_before_the_long_work(llama, tokenizer, saes, broken):
    settings = {"aligned": ["red"] * 10**6, **broken}
    with pytest.raises(DataError, match=r"data 'no.jsonl' cannot be opened"):
        _build(llama, tokenizer, saes, **settings)


def test_a_block_with_two_saes_needs_the_hook_point(llama, tokenizer):
    saes = load_saes([make_sae("blocks.1.hook_resid_post"), make_sae("blocks.1.hook_resid_pre", seed=1)])
    with pytest.raises(SelectionError, match="could mean any of the SAEs"):
        _build(llama, tokenizer, saes, protect=["1:3"])


def test_the_same_weights_at_two_places_are_two_saes(llama, tokenizer):
    saes = load_saes([make_sae("blocks.0.hook_resid_post"), make_sae("blocks.2.hook_resid_post")])
    built = _build(llama, tokenizer, saes, protect=["0:7"])
    assert built.protected_features["name"].tolist() == ["blocks.0.hook_resid_post:7"]
    assert [site.sae.hook_name for site in built.sites] == ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]


def test_the_subspace_records_how_its_protected_features_were_found(llama, tokenizer, saes):
    assert _build(llama, tokenizer, saes, protect=["0:7"]).settings["protect"] == ["0:7"]
    built = _build(llama, tokenizer, saes, protect=(["red red"], ["blue blue"]), protect_top_k=3)
    assert built.settings["protect"]["top_k"] == 3
    assert built.settings["protect"]["statistics"]["examples"] == {"aligned": 1, "unaligned": 1}


def test_a_pair_of_which_one_is_a_name_is_refused(llama, tokenizer, saes):
    with pytest.raises(ConfigError, match="neither two names of features nor two sets"):
        _build(llama, tokenizer, saes, protect=("0:7", "2-9"))
