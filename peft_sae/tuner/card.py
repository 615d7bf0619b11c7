"""What an adapter's model card must say, so that whoever downloads it can load it."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_HINT = """
> **This adapter has the PEFT type `SAE_SUBSPACE`.** Install `peft-sae` and run `import peft_sae` before loading it;
> without that PEFT and transformers stop with `KeyError: 'SAE_SUBSPACE'`. `peft-sae export-lora ADAPTER OUTPUT` turns
> it into a plain LoRA adapter, which every PEFT loads.

"""
_LARGEST = 2**20  # bytes; PEFT's own card has a few thousand


def add_hint(folder: str | Path) -> None:
    """Put the hint under the front matter of the model card that PEFT has written, once.

    A card that is not PEFT's is left alone, and one that cannot be written is told: a hint fails no save.

    Args:
        folder: the adapter's folder; an adapter with a name lies beneath the folder that has the card.
    """
    for place in (Path(folder), Path(folder).parent):
        try:
            if _add_to(place / "README.md"):
                return
        except (OSError, UnicodeError) as error:
            logger.warning("The model card '%s' does not say how to load the adapter (%s).", place, error)
            return


def _add_to(card: Path) -> bool:
    """Whether it is PEFT's card, which has the hint now."""
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
    body = "".join(lines[end:])
    if _HINT.strip().splitlines()[0] in body:
        return True
    handle, name = tempfile.mkstemp(dir=card.parent, prefix=".README.")
    with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
        file.write("".join(lines[:end]) + _HINT + body.lstrip("\r\n"))
    Path(name).chmod(card.stat().st_mode)
    Path(name).replace(card)
    return True
