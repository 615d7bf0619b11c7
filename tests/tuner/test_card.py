"""The hint in the model card that PEFT has written, and in no other file."""

from dataclasses import replace

import pytest
from peft import get_peft_model

from peft_sae import SaeSubspaceConfig
from peft_sae.tuner.card import add_hint
from tests.tiny import make_model, make_subspace

CARD = "---\nlibrary_name: peft\ntags:\n- lora\n---\n\n# Model card\n"


def test_the_hint_stands_once_under_the_front_matter(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    for _ in range(2):
        add_hint(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("import peft_sae") == 1
    assert text.index("\n---\n") < text.index("import peft_sae") < text.index("# Model card")
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_an_adapter_with_a_name_finds_the_card_above_it(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "named").mkdir()
    add_hint(tmp_path / "named")
    assert "import peft_sae" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "content",
    [
        b"# A project with adapters, library_name: peft\n",
        b"---\nlibrary_name: peft\n",
        b"---\nlibrary_name: other\n---\nlibrary_name: peft\n",
        "---\nlibrary_name: peft\n---\nna\u00efve".encode("latin-1"),
        b"",
    ],
)
def test_what_is_not_pefts_card_is_left_alone(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    add_hint(tmp_path / "adapter")
    assert (tmp_path / "README.md").read_bytes() == content


def test_a_linked_card_is_not_followed(tmp_path):
    (tmp_path / "other.md").write_text(CARD)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").symlink_to(tmp_path / "other.md")
    add_hint(tmp_path / "adapter")
    assert (tmp_path / "other.md").read_text() == CARD


def test_line_ends_stay(tmp_path):
    (tmp_path / "README.md").write_bytes(CARD.replace("\n", "\r\n").encode())
    add_hint(tmp_path)
    assert b"# Model card\r\n" in (tmp_path / "README.md").read_bytes()


def _saved(folder, **fields):
    model = make_model()
    subspace = fields.pop("subspace", None) or make_subspace(model, protected={"blocks.1.hook_resid_post": 3})
    adapted = get_peft_model(model, SaeSubspaceConfig(subspace=subspace, target_modules=["q_proj"], **fields))
    adapted.save_pretrained(folder)
    return adapted, (folder / "README.md").read_text()


def test_the_card_lists_features_protection_and_provenance(tmp_path):
    adapted, card = _saved(tmp_path)
    digest = adapted.peft_config["default"].basis_record["digest"]
    for part in ("## Features", "`blocks.1.hook_resid_post` | sae0 | 4 | 4 |", "Protected features", digest, "by hand"):
        assert part in card
    assert "may have moved away" in card
    assert "stays in their span" in _saved(tmp_path / "frozen", freeze_basis=True, r=4)[1]


def test_the_section_is_replaced_not_repeated(tmp_path):
    adapted, first = _saved(tmp_path)
    own = first.replace("# Model Card", "# My own words\n\n# Model Card")
    (tmp_path / "README.md").write_text(own)
    adapted.peft_config["default"].norm_gain = False
    adapted.save_pretrained(tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert again.count("## Features") == 1
    assert "norm\\_gain false" in again
    assert "norm\\_gain true" not in again
    assert again.count("import peft_sae") == 1


def test_adapters_with_names_share_a_card_and_keep_their_sections(tmp_path):
    adapted, _ = _saved(tmp_path)
    other = make_subspace(make_model(), seed=3)
    adapted.add_adapter("second", SaeSubspaceConfig(subspace=other, target_modules=["v_proj"]))
    for _ in range(2):
        adapted.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Features\n") == 1
    assert card.count("## Features of the adapter second\n") == 1


def test_what_files_say_cannot_write_the_card(tmp_path):
    """Names and tokens are other people's words."""
    bad = "<script>x</script>|[a](javascript:1)\n# head <!-- end of peft_sae features -->"
    subspace = make_subspace(make_model())
    (site,) = subspace.sites
    site = replace(site, sae=replace(site.sae, name=bad), tokens=((bad, "`"),) * 4)
    card = _saved(tmp_path, subspace=replace(subspace, sites=(site,)))[1]
    assert "<script" not in card.replace("\\<script", "")
    assert "\n# head" not in card
    assert "[a](javascript" not in card
    assert card.count("<!-- end of peft_sae features -->") == 1
    (row,) = [line for line in card.splitlines() if line.startswith("| `blocks.1")]
    assert row.replace("\\|", "").count("|") == 6
