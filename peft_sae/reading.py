"""Reading files that anyone may have written: only files are opened, and none that is larger than it should be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .errors import ArtifactError

LARGEST_JSON = 2**28  # bytes; the largest that is written has some millions
MEGATRON = "megatron.core"  # what PEFT imports for LoRA's `megatron_core`, which may be any module's name
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_DEEPEST = 64  # levels of nesting; what is written has fewer than ten


def read_text(path: Path, *, largest: int = LARGEST_JSON) -> str:
    """Return the text of a file, after a look at its size.

    Raises:
        OSError: it is not there, no file, or cannot be read.
        ValueError: it is too large or not UTF-8.
    """
    size = check_regular(path)
    if size > largest:
        raise ValueError(f"it has {size} bytes, and {largest} is the most that such a file has")
    return path.read_text(encoding="utf-8")


def check_regular(path: Path) -> int:
    """Return the size of a file in bytes; a pipe or a device would be waited for.

    Raises:
        OSError: it is not there, or no file.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise OSError(f"it is no file: '{path}'")
    return size


def parse_json(text: str) -> Any:
    """Parse JSON that says everything once, and is not nested so deeply that whoever walks it runs out of stack.

    Raises:
        ValueError: it is none.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [data]
    for _ in range(_DEEPEST):
        level = [child for value in level for child in _children(value)]
        if not level:
            return data
    raise ValueError("it is nested too deeply")


def check_inside(path: Path, root: Path) -> None:
    """Check that what is a part of a folder lies in it.

    Raises:
        ArtifactError: it is a link that leads elsewhere.
    """
    if not stays_inside(path, root):
        raise ArtifactError(
            f"'{path}' is a link that leads out of '{root}', and nothing is read from elsewhere for a folder's sake. "
            "Put the file itself there."
        )


def stays_inside(path: Path, root: Path) -> bool:
    """Return whether a path in a folder lies there, or in the Hub's cache, once its links are followed.

    The Hub's cache keeps files under names that are digests of their contents, beside all snapshots of the repository,
    or beside all repositories; older versions of its library also filled other folders with links to it. Whoever can
    name such a file knows what is in it.
    """
    try:
        place, root = path.resolve(), root.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    repositories = [folder.parent.parent for folder in (root, *root.parents) if folder.parent.name == "snapshots"]
    stores = [home / "blobs" for repository in repositories for home in (repository, repository.parent)]
    cached = _DIGEST.fullmatch(place.name) is not None and place.parent.name == "blobs"
    return cached or place.is_relative_to(root) or any(place.is_relative_to(store) for store in stores)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"it has {twice[:80]!r} twice")
    return found


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
