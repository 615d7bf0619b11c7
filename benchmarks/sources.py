"""Where results lie, and how what was asked of them is said to be met."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_sae.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """The results of one benchmark, and how a page links to them.

    Attributes:
        folder: that holds them.
        link: of that folder, from the page.
    """

    folder: Path
    link: str

    def read(self, name: str) -> dict[str, Any]:
        """Return a result file's content; empty if it is not there.

        Raises:
            ConfigError: it is a quick run's, whose numbers say nothing.
        """
        path = self.folder / name
        if not path.is_file():
            return {}
        found: dict[str, Any] = json.loads(path.read_text())
        if found.get("quick"):
            raise ConfigError(
                f"'{path}' is the result of a quick run, whose numbers say nothing, so no page is made of it. Run the "
                "benchmark without --quick, or name another folder."
            )
        return found

    def section(self, name: str, title: str, plot: str) -> Iterator[str]:
        """Yield a table under its title, and its plot."""
        path = self.folder / name
        if not path.is_file():
            yield f"### {title}\n\nNot run yet."
            return
        yield f"### {title}\n\n{path.read_text().strip()}"
        if (self.folder / f"{plot}.png").is_file():
            yield f"![{title}]({self.link}/{plot}.png)"


def verdict(text: str, met: bool | None) -> str:
    """A line of what was asked; None where the interval holds both answers."""
    return f"- **{'Open' if met is None else 'Met' if met else 'Missed'}.** {text}"


def at_least(found: Mapping[str, float], least: float) -> bool | None:
    """Whether a difference is at least so much: if all of its interval is, or none, or, None, if a part of it is."""
    if found["low"] >= least:
        return True
    return None if found["high"] >= least else False
