"""The page that the suite writes is the one that is there."""

import importlib
from pathlib import Path

from tests.parity.harness import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
MODULES = ("test_targets", "test_options", "test_adapters", "test_lifecycle")


def abilities():
    for name in MODULES:
        module = importlib.import_module(f"tests.parity.{name}")
        for test in vars(module).values():
            for marker in getattr(test, "pytestmark", []):
                if marker.name == "ability":
                    yield marker.kwargs["name"]


def test_the_page_has_a_row_for_every_ability_and_each_was_run_and_passed():
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert rows[0] == ["Ability", *KINDS]
    assert sorted(row[0] for row in rows[1:]) == sorted(abilities())
    assert all(cell == "yes" or cell.startswith("refused: ") for row in rows[1:] for cell in row[1:])
