"""Selections from files and options, on the code that the command runs."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from peft_sae import FeatureStatistics, Subspace
from peft_sae.errors import ConfigError, DataError, MismatchError, SelectionError
from peft_sae.jobs.selection import read_selection
from peft_sae.jobs.selection_run import run_selection
from peft_sae.statistics import collect
from tests.tiny import make_model, make_sae

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "selection").glob("*.yaml"))


PLACES = {"model": "base", "saes": "saes", "output": "subspace"}
TEXTS = {"aligned": "aligned.jsonl", "unaligned": "unaligned.jsonl"}


def _run(**options):
    return run_selection(read_selection(None, **{**PLACES, "top_k": 4, **options}), progress=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_selection_is_one(path):
    job = read_selection(path, output="out", **TEXTS)
    assert job.saes
    assert len(job.ids) >= 4


def test_a_file_and_options_say_the_same(world):
    by_options = _run(**TEXTS, direction="aligned").subspace
    settings = {**PLACES, **TEXTS, "direction": "aligned", "top_k": 9}
    (world / "selection.yaml").write_text(yaml.safe_dump(settings))
    by_file = run_selection(read_selection("selection.yaml", top_k=4), progress=False).subspace
    assert by_file.digest == by_options.digest
    assert Subspace.from_pretrained("subspace").digest == by_file.digest
    assert all(bool((site.scores > 0).all()) for site in by_file.sites)


def test_preferences_are_two_sets(world):
    assert _run(preferences="preferences.jsonl").subspace.sites[0].features.tolist() == (
        _run(**TEXTS).subspace.sites[0].features.tolist()
    )


def test_statistics_are_selected_from_again_without_running_the_model(world, monkeypatch):
    first = _run(**TEXTS, statistics="statistics", selector="auroc")
    assert sorted(path.name for path in world.iterdir() if "statistics" in path.name) == ["statistics"]

    def refuse(*_, **__):
        raise AssertionError("the model was run")

    monkeypatch.setattr(collect, "capturing", refuse)
    again = _run(from_statistics="statistics", selector="auroc")
    for one, other in zip(first.subspace.sites, again.subspace.sites, strict=True):
        torch.testing.assert_close(one.scores, other.scores)
    best, second = first.subspace.sites[0].features.tolist()[:2]
    edited = _run(from_statistics="statistics", selector="auroc", drop=[f"0:{best}"], keep=["0:63"]).subspace.sites[0]
    assert edited.features.tolist()[:2] == [63, second]
    assert best not in edited.features.tolist()


def test_statistics_of_something_else_are_refused(world):
    _run(**TEXTS, statistics="statistics")
    before = (world / "statistics" / "statistics.safetensors").read_bytes()
    make_sae("blocks.2.hook_resid_post", seed=7).save_model(world / "saes" / "blocks.2.hook_resid_post")
    with pytest.raises(
        MismatchError, match=r"statistics in 'statistics' are of the SAEs .*other hook points or weights"
    ):
        _run(from_statistics="statistics")
    make_sae("blocks.2.hook_resid_post", seed=2).save_model(world / "saes" / "blocks.2.hook_resid_post")
    make_model(seed=5).save_pretrained(world / "base")
    with pytest.raises(MismatchError, match="collected on another model"):
        _run(from_statistics="statistics")
    make_model().save_pretrained(world / "base")
    with pytest.raises(SelectionError, match=r"no histograms.*Measures\(histograms=True\)"):
        _run(from_statistics="statistics", selector="auroc")
    assert (world / "statistics" / "statistics.safetensors").read_bytes() == before
    assert FeatureStatistics.from_pretrained("statistics")


def test_retained_features_are_left_alone_or_protected(world):
    (world / "retain.jsonl").write_text(json.dumps({"text": "sun moon sky sun"}) + "\n")
    plain = _run(**TEXTS).subspace
    kept_out = _run(**TEXTS, retain="retain.jsonl")
    over = {site.sae.hook_name: set(site.features.tolist()) for site in kept_out.selection.retained}
    assert over
    for before, after in zip(plain.sites, kept_out.subspace.sites, strict=True):
        assert not over.get(after.sae.hook_name, set()) & set(after.features.tolist())
        assert set(before.features.tolist()) <= set(after.features.tolist()) | over.get(after.sae.hook_name, set())
    assert kept_out.subspace.protected == ()
    protected = _run(**TEXTS, retain="retain.jsonl", retain_by="protect").subspace.protected
    assert {site.sae.hook_name: set(site.features.tolist()) for site in protected} == over


def test_a_control_takes_the_place_of_the_features(world):
    plain = _run(**TEXTS).subspace
    for kind in ("random", "neurons", "difference_pca"):
        control = _run(**TEXTS, control=kind).subspace
        assert control.settings["control"] == kind
        assert [site.rank for site in control.sites] == [site.rank for site in plain.sites]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "response"}, r"'tokens': \('response', 'all'\).*cannot be changed"),
        ({"pooling": "mean"}, r"'pooling': \('mean', 'token'\)"),
        ({"max_length": 5}, r"'max_length': \(5, 64\)"),
        ({"measures": ["sample"]}, "are about collecting"),
        ({**TEXTS, "texts": 2}, "are collected, without texts"),
    ],
)
def test_what_kept_statistics_cannot_follow_is_refused(world, options, message):
    _run(**TEXTS, statistics="statistics")
    assert _run(from_statistics="statistics", tokens="all", max_length=64)
    with pytest.raises(ConfigError, match=message):
        _run(from_statistics="statistics", **options)


def test_statistics_can_be_kept_for_every_selector(world):
    measures = ["histograms", "sample", "covariance"]
    _run(**TEXTS, statistics="statistics", measures=measures)
    for selector in ("auroc", "probe", "cosine", "firing_rate", "random"):
        assert _run(from_statistics="statistics", selector=selector, control=None).selection.sites
    assert _run(from_statistics="statistics", control="difference_pca").subspace.settings["control"] == "difference_pca"


def test_names_are_checked_before_the_model_runs(world, monkeypatch):
    monkeypatch.setattr("peft_sae.jobs.selection_run.collect_statistics", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(SelectionError, match="'0:99' names feature 99"):
        _run(**TEXTS, drop=["0:99"])


def test_preference_files_are_opened_before_anything_is_loaded(world):
    with pytest.raises(DataError, match=r"preference data 'nowhere\.jsonl' cannot be opened"):
        _run(preferences="nowhere.jsonl", model="nowhere")


def test_a_contrast_protects_what_it_can_show(world):
    texts = [" ".join(pair) for pair in (("red", "sun"), ("sea", "hill"), ("moon", "sky"), ("fish", "tree"))]
    for name, extra in (("one", " stone stone"), ("other", " bird bird")):
        records = [json.dumps({"text": f"{text} {more}{extra}"}) for text in texts for more in ("red", "blue", "green")]
        (world / f"{name}.jsonl").write_text("\n".join(records))
    pair = ("one.jsonl", "other.jsonl")
    every = _run(**TEXTS, protect_contrast=pair, protect_top_k=6).subspace.protected
    assert [len(site.features) for site in every] == [6, 6]
    sure = _run(**TEXTS, protect_contrast=pair, protect_top_k=64, protect_max_q=1e-3).subspace.protected
    assert 0 < len(sure[0].features) < 64
    with pytest.raises(SelectionError, match="is left"):
        _run(**TEXTS, protect_contrast=pair, protect_max_q=0.0)


def test_random_features_depend_on_the_seed(world):
    first, again, other = (
        _run(**TEXTS, selector="random", seed=seed).subspace.sites[0].features.tolist() for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "It takes two sets of text"),
        ({**TEXTS, "preferences": "p"}, "It takes two sets of text"),
        ({"aligned": "aligned.jsonl"}, "It takes two sets of text"),
        ({"from_statistics": "s", "retain": "r"}, "--retain and --statistics have no place"),
        ({**TEXTS, "protect": ["0:1"], "protect_contrast": ("a", "b")}, "Use one of the two"),
        ({**TEXTS, "max_q": 1.5}, "max_q=1.5 is no share"),
        ({**TEXTS, "selector_": "auroc"}, r"unknown key 'selector_'.*Did you mean 'selector'"),
        ({**TEXTS, "ids": "one"}, "Key 'ids' in the command is 'one', and a list is needed"),
        ({**TEXTS, "pooling": "sum"}, "'token' or 'mean' or 'max' or 'last' is needed"),
        ({**TEXTS, "seed": True}, "Key 'seed' .* is True, and a whole number is needed"),
    ],
)
def test_a_selection_is_checked_before_anything_is_loaded(options, message):
    with pytest.raises(ConfigError, match=message):
        read_selection(None, **PLACES, **options)
