"""Where the SAEs of releases belong, read off their ids without any network."""

import pytest

from peft_sae.errors import ConfigError
from peft_sae.sae.places import expected_places

PLACES = [
    ("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical", "blocks.20.hook_resid_post"),
    ("gemma-scope-2b-pt-att-canonical", "layer_20/width_16k/canonical", "blocks.20.attn.hook_z"),
    ("gemma-scope-2b-pt-mlp-canonical", "layer_20/width_16k/canonical", "blocks.20.hook_mlp_out"),
    ("llama_scope_lxr_8x", "l15r_8x", "blocks.15.hook_resid_post"),
    ("llama_scope_lxm_8x", "l15m_8x", "blocks.15.hook_mlp_out"),
    ("gpt2-small-res-jb", "blocks.8.hook_resid_pre", "blocks.8.hook_resid_pre"),
    ("gpt2-small-res-jb-feature-splitting", "blocks.8.hook_resid_pre_98304", "blocks.8.hook_resid_pre"),
    ("gpt2-small-resid-mid-v5-32k", "blocks.3.hook_resid_mid", "blocks.3.hook_resid_mid"),
    ("gpt2-small-hook-z-kk", "blocks.11.hook_z", "blocks.11.attn.hook_z"),
    ("mistral-7b-res-wg", "blocks.8.hook_resid_pre", "blocks.8.hook_resid_pre"),
    ("pythia-70m-deduped-att-sm", "blocks.0.hook_attn_out", "blocks.0.hook_attn_out"),
    (
        "sae_bench_gemma-2-2b_topk_width-2pow14_date-1109",
        "blocks.5.hook_resid_post__trainer_5_step_46322",
        "blocks.5.hook_resid_post",
    ),
]


@pytest.mark.parametrize(("release", "sae_id", "hook_name"), PLACES, ids=[f"{place[0]}" for place in PLACES])
def test_hook_point_is_what_the_id_says(release, sae_id, hook_name):
    (place,) = expected_places(release, ids=[sae_id])
    assert place.hook_name == hook_name
    assert place.by_name


@pytest.mark.parametrize(
    ("release", "sae_id"),
    [
        ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"),
        ("llama_scope_lxa_8x", "l15a_8x"),
        ("goodfire-llama-3.1-8b-instruct", "layer_19"),
    ],
)
def test_an_id_that_does_not_say_it_is_refused_and_not_guessed_at(release, sae_id):
    with pytest.raises(ConfigError, match="does not say where it belongs"):
        expected_places(release, ids=[sae_id])
