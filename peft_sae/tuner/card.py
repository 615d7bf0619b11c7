"""What an adapter's model card must say, so that whoever downloads it can load it."""

from __future__ import annotations

from pathlib import Path

_HINT = """
> **This adapter has the PEFT type `SAE_SUBSPACE`.** Install `peft-sae` and run `import peft_sae` before loading it;
> without that PEFT and transformers stop with `KeyError: 'SAE_SUBSPACE'`. `peft-sae export-lora ADAPTER OUTPUT` turns
> it into a plain LoRA adapter, which every PEFT loads.

"""
_FENCE = "---\n"


def add_hint(folder: str | Path) -> None:
    """Put the hint under the front matter of the model card that PEFT has written, once.

    Args:
        folder: the adapter's folder; an adapter with a name lies beneath the folder that has the card.
    """
    for place in (Path(folder), Path(folder).parent):
        card = place / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if "library_name: peft" not in text:
            continue
        if _HINT.strip() not in text:
            end = text.find(f"\n{_FENCE}", len(_FENCE)) if text.startswith(_FENCE) else -1
            at = 0 if end < 0 else end + 1 + len(_FENCE)
            card.write_text(text[:at] + _HINT + text[at:].lstrip("\n"), encoding="utf-8")
        return
