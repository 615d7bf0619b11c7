"""The hint in the model card that PEFT has written, and in no other file."""

import pytest

from peft_sae.tuner.card import add_hint

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
