from dataclasses import replace

import pytest
from rich.console import Console

from peft_sae.cli.tables import print_features
from peft_sae.selection import FeatureExample, FeatureRow, FeatureTable
from tests.tiny import make_model, make_subspace

HOOK = "blocks.1.hook_resid_post"
EVIL = ("[/INST]", "[bold]", "\x1b[31m", "\ud800", "\r\n")
SHOWN = ("[/INST]", "[bold]", "\\x1b[31m", "\\ud800", "\\r\\n")
ROW = FeatureRow(1, 1, HOOK, "sae", 7, f"{HOOK}:7", 1.23456, 0.0123, 2.0, 0.5, 0.25, 0.125)


@pytest.fixture
def printed():
    """Print a table on a wide terminal with colours; returns what was written."""

    def call(*arguments, **options):
        console = Console(width=600, force_terminal=True, color_system="standard", legacy_windows=False)
        with console.capture() as capture:
            print_features(*arguments, console=console, **options)
        return capture.get()

    return call


def test_rows_by_hook_point(printed):
    rows = [replace(ROW, rank=rank, feature=100 + rank) for rank in range(1, 6)]
    rows.append(replace(ROW, hook_name="blocks.2.hook_mlp_out", feature=999))
    text = printed(FeatureTable(tuple(rows), {}), per_site=3)

    assert f"{HOOK}: 5 features" in text
    assert "blocks.2.hook_mlp_out: 1 features" in text
    assert [str(feature) in text for feature in (101, 102, 103, 104, 105, 999)] == [True] * 3 + [False] * 2 + [True]
    assert "... and 2 more" in text
    assert all(number in text for number in ("1.23", "0.012", "2 (0.5)", "25.0 (12.5)"))
    assert not any(sign in text for sign in ("+ ", "- ", "rank"))


def test_words_label_and_the_best_text(printed):
    examples = (
        FeatureExample("aligned", 0, 1.0, "a ", "weak", ""),
        FeatureExample("unaligned", 3, 2.0, "b ", "sun", " c"),
    )
    row = replace(ROW, label="weather", promoted=(" sun", " "), suppressed=("sea",), examples=examples)
    text = printed(FeatureTable((row,), {}))

    assert all(word in text for word in ("weather", "+ sun ␣", "- sea", "b \x1b[1msun\x1b[0m c"))
    assert "weak" not in text


def test_numbers_stay_whole_on_80_columns(capsys):
    row = replace(ROW, feature=131071, score=-0.012345, promoted=tuple("abcdefgh" * 3), label="x" * 50)
    print_features(FeatureTable((row,), {}), console=Console(width=80))
    text = capsys.readouterr().out
    assert all(number in text for number in ("131071", "-0.0123", "0.012", "2 (0.5)", "25.0 (12.5)"))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.count("x") == 50


def test_the_subspace_tells_rank_and_protection(printed):
    subspace = make_subspace(make_model(), {HOOK: 4}, protected={"blocks.0.hook_resid_post": 2})
    text = printed(FeatureTable((ROW,), {}), subspace)

    assert f"{HOOK}: 1 features, basis of rank 4" in text
    assert "blocks.0.hook_resid_post: protected" in text
    assert all(feature in text for feature in ("40", "41"))


def test_a_subspace_alone_tells_what_it_knows(printed):
    subspace = make_subspace(make_model(), {HOOK: 4}, protected={"blocks.0.hook_resid_post": 2})
    subspace = replace(subspace, sites=(replace(subspace.sites[0], tokens=(("sun",), (), (), ())),))
    text = printed(subspace)

    assert f"{HOOK}: 4 features, basis of rank 4" in text
    assert "blocks.0.hook_resid_post: protected" in text
    assert all(word in text for word in ("+ sun", "100.0 (0.0)"))
    assert "- " not in text


def test_words_cannot_write_to_the_terminal(printed):
    subspace = make_subspace(make_model(), protected={"blocks.0.hook_resid_post": 1})
    subspace = replace(subspace, protected=(replace(subspace.protected[0], tokens=(EVIL,)),))
    plain = "".join(EVIL)
    example = FeatureExample("aligned", 0, 1.0, plain, plain, plain)
    rows = (
        replace(ROW, promoted=EVIL, suppressed=EVIL),
        replace(ROW, label=plain, examples=(example,)),
        replace(ROW, hook_name=f"hook{plain}", label=plain),
    )
    text = printed(FeatureTable(rows, {}), subspace)

    for word in SHOWN:
        assert text.count(word) >= 2 + 4 + 2 + 1
    assert not any(word in text for word in ("\x1b[31m", "\ud800", "\r"))
