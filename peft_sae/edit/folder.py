"""Copying what lies beside an adapter's weights."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from ..adapter import CONFIG_FILE, EDIT_FILE, WEIGHTS_FILE
from ..errors import ArtifactError
from ..reading import stays_inside

_REPLACED = (WEIGHTS_FILE, EDIT_FILE)
# Other copies of the weights of before the edit, and the state of a training that does not go on from the edited ones.
_STALE = ("*.bin", "*.pt", "*.pkl", "checkpoint-*", "global_step*", "optimizer*", "rng_state*")
_NEEDED = (CONFIG_FILE, "subspace")


def check_apart(adapter: Path, output: Path) -> None:
    """Raise an error if an output is the adapter itself, or in it.

    Raises:
        ArtifactError: it is.
    """
    if output.resolve().is_relative_to(adapter.resolve()):
        raise ArtifactError(
            f"The output '{output}' is the adapter '{adapter}' or lies in it, and an edit never changes the original. "
            "Give another folder."
        )


def copy_beside(adapter: Path, target: Path) -> list[str]:
    """Copy an adapter's files but for its weights: configuration, Subspace, model card, tokenizer and others.

    Left out are links that lead out of the folder, which might bring anything along, and what only holds for the
    weights of before: checkpoints, the optimiser's state, and other adapters in sub-folders.

    Args:
        adapter: the adapter's folder, or its snapshot in the Hub's cache.
        target: folder to copy to.

    Returns:
        What was left out, as paths in the adapter's folder.

    Raises:
        ArtifactError: what must come along is a link that leads out of the folder.
    """
    left_out: list[str] = []
    _copy(adapter, target, adapter, left_out)
    needed = [path for path in left_out if Path(path).parts[0] in _NEEDED]
    if needed:
        raise ArtifactError(
            f"'{adapter / needed[0]}' is a link that leads out of the adapter's folder, or no file, so it is not "
            "copied, and the edited adapter would be incomplete. Put the file itself there."
        )
    return left_out


def _copy(folder: Path, target: Path, root: Path, left_out: list[str]) -> None:
    for path in sorted(folder.iterdir()):
        if folder == root and path.name in _REPLACED:
            continue
        if path.is_file() and stays_inside(path, root) and not _is_stale(path):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and not path.is_symlink() and not _is_stale(path):
            (target / path.name).mkdir()
            _copy(path, target / path.name, root, left_out)
        else:
            left_out.append(path.relative_to(root).as_posix())


def _is_stale(path: Path) -> bool:
    if any(fnmatch(path.name, pattern) for pattern in _STALE):
        return True
    return path.is_dir() and (path.name.startswith(".") or (path / CONFIG_FILE).exists())
