"""The files of a checkpoint beside its weights."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_NAME
from ..errors import ArtifactError
from ..reading import check_inside

logger = logging.getLogger(__name__)

_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab"}
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)
_TEMPLATES = "additional_chat_templates"
_LARGEST = 2**28  # bytes; a tokenizer of 256k tokens has 35 MB
_NOT_COMPANIONS = ("adapter_config.json", "trainer_state.json")


def copy_companions(base: Path, folder: Path, changes: Mapping[str, Any]) -> None:
    """Copy configuration, tokenizer, chat templates and code files of a checkpoint as they are.

    Code is copied, never run.

    Args:
        base: folder of the base model.
        folder: where they go.
        changes: of the configuration, for the text part if it has one.

    Raises:
        ArtifactError: one is a link that leads out of the base's folder, or far too large.
    """
    for path in sorted(base.iterdir()):
        known = path.suffix in _SUFFIXES or path.name.upper().startswith(("LICENSE", "NOTICE", "USE_POLICY"))
        if known and path.is_file() and not path.name.endswith(".index.json") and path.name not in _NOT_COMPANIONS:
            check_inside(path, base)  # what is copied may be published
            _copy(path, folder / path.name)
    templates = base / _TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        (folder / _TEMPLATES).mkdir()
        for path in sorted(templates.glob("*.jinja")):
            check_inside(path, base)
            _copy(path, folder / _TEMPLATES / path.name)
    if changes:
        change_config(folder / CONFIG_NAME, changes)


def change_config(path: Path, changes: Mapping[str, Any]) -> None:
    """Change keys where the configuration has them, in the text part of one of several parts."""
    config = json.loads(path.read_text(encoding="utf-8"))
    parts = [config, *(config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict))]
    for key, value in changes.items():
        owners = [part for part in parts if key in part] or [config]
        for owner in owners:
            owner[key] = value
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(adapter: Path, folder: Path) -> bool:
    """Copy the tokenizer that an adapter was trained with, if it has one of its own.

    A tokenizer that names code of its own is passed over: the base's stays.

    Returns:
        Whether it was copied.

    Raises:
        ArtifactError: one of its files is a link that leads out of the adapter's folder, or far too large.
    """
    settings = adapter / "tokenizer_config.json"
    for name in _TOKENIZER:
        if (adapter / name).exists():
            check_inside(adapter / name, adapter)
    if not settings.is_file() or not any((adapter / name).is_file() for name in _TOKENIZER[:1] + _TOKENIZER[6:]):
        return False
    try:
        named = json.loads(settings.read_text(encoding="utf-8"))
        if not isinstance(named, dict) or "auto_map" in named:
            raise ValueError("it names code of its own")
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("The tokenizer in '%s' is left out (%s); the base's is used.", adapter, error)
        return False
    for name in _TOKENIZER:
        (folder / name).unlink(missing_ok=True)
        if (adapter / name).is_file():
            _copy(adapter / name, folder / name)
    return True


def _copy(path: Path, target: Path) -> None:
    if path.stat().st_size > _LARGEST:
        raise ArtifactError(f"'{path}' has {path.stat().st_size:,} bytes, which is no configuration or tokenizer.")
    shutil.copyfile(path, target)
