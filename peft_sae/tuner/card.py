"""What an adapter's model card must say, so that whoever downloads it can load it."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

_HINT = """
> **This adapter has the PEFT type `SAE_SUBSPACE`.** Install `peft-sae` and run `import peft_sae` before loading it;
> without that PEFT and transformers stop with `KeyError: 'SAE_SUBSPACE'`. `peft-sae export-lora ADAPTER OUTPUT` turns
> it into a plain LoRA adapter, which every PEFT loads.

"""
_LARGEST = 2**20  # bytes; PEFT's own card has a few thousand


def add_hint(folder: str | Path, section: Callable[[str, str], str] | None = None) -> None:
    """Put the hint under the front matter of the model card that PEFT has written, and a section in it, once.

    A card that is not PEFT's is left alone, and one that cannot be written is told: a hint fails no save.

    Args:
        folder: the adapter's folder; an adapter with a name lies beneath the folder that has the card.
        section: takes the card's text and the adapter's name, which is empty where the card lies in the adapter's own
            folder, and returns the text with the section.
    """
    for place, name in ((Path(folder), ""), (Path(folder).parent, Path(folder).name)):
        card = place / "README.md"
        try:
            if amend_card(card, functools.partial(_with_hint, name=name, section=section)):
                return
        except (OSError, UnicodeError) as error:
            logger.warning("The model card '%s' does not say how to load the adapter (%s).", card, error)
            return


def _with_hint(body: str, *, name: str, section: Callable[[str, str], str] | None) -> str:
    if _HINT.strip().splitlines()[0] not in body:
        body = _HINT + body.lstrip("\r\n")
    return body if section is None else section(body, name)


def amend_card(card: Path, change: Callable[[str], str]) -> bool:
    """Change the text under the front matter of a model card, whole or not at all.

    Args:
        card: the file.
        change: takes the text and returns another.

    Returns:
        Whether it is a card of PEFT's; no other file is changed.

    Raises:
        OSError, UnicodeError: it cannot be read or written.
    """
    if card.is_symlink() or not card.is_file() or card.stat().st_size > _LARGEST:
        return False
    with card.open(encoding="utf-8", newline="") as file:
        lines = file.read().splitlines(keepends=True)
    stripped = [line.strip() for line in lines]
    if not stripped or stripped[0] != "---" or "---" not in stripped[1:]:
        return False
    end = stripped.index("---", 1) + 1
    if "library_name: peft" not in stripped[:end]:
        return False
    before = "".join(lines[end:])
    body = change(before)
    if body == before:
        return True
    handle, scratch = tempfile.mkstemp(dir=card.parent, prefix=".README.")
    with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
        file.write("".join(lines[:end]) + body)
    Path(scratch).chmod(card.stat().st_mode)
    Path(scratch).replace(card)
    return True
