"""Scratch files beside a target: who writes there now, and what killed processes have left."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ArtifactError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: nobody is kept out there, and nothing is tidied up
    fcntl = None

_LONGEST = 100  # bytes of a name that leave room for what is added to it
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux' own, from fcntl.h and linux/fs.h


@contextmanager
def held(target: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing a target, and tidy up what killed ones have left beside it.

    The lock is a file beside the target that is locked by the system, which gives it up when its owner dies, however
    that happens. So whatever has a scratch name of the target belongs to nobody once the lock is had.

    Args:
        target: file or folder, a resolved path in a folder that exists.
        wait: wait for another process instead of stopping.

    Raises:
        ArtifactError: another process writes the target.
        OSError: the place cannot be written.
    """
    path = target.with_name(f"{_stem(target)}.lock")
    handle = _lock(path, target, wait)
    try:
        if handle is not None:
            _tidy(target)
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)  # while it is ours: nobody takes one that is about to go
            fcntl.flock(handle, fcntl.LOCK_UN)  # also for processes that were forked meanwhile
            os.close(handle)


def tidy(target: Path) -> None:
    """Remove what killed processes have left beside a target, if nobody writes it now and that can be done."""
    try:
        with held(target):
            pass
    except OSError:
        return


def scratch_folder(target: Path) -> Path:
    """Make a folder beside a target under a name that nobody can foresee."""
    return Path(tempfile.mkdtemp(prefix=f"{_stem(target)}.", suffix=".partial", dir=target.parent))


def swap_in(scratch: Path, target: Path) -> None:
    """Put a scratch folder in the place of a target, which is missing, empty, or an earlier version.

    Where the system can exchange two folders, there is no moment without one. Elsewhere a process that is killed
    between two renames leaves the earlier version under a scratch name, from which the next `held` puts it back.
    """
    if not target.exists() or not any(target.iterdir()):
        os.replace(scratch, target)
    elif not exchange(scratch, target):
        retired = target.with_name(f"{scratch.name}.old")
        os.replace(target, retired)
        try:
            os.replace(scratch, target)
        except OSError:
            if not target.exists():
                os.replace(retired, target)
            raise
        finally:
            shutil.rmtree(retired, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; return False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    done = call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return bool(done == 0)


def _stem(target: Path) -> str:
    name = os.fsencode(target.name)
    return f".{target.name}" if len(name) <= _LONGEST else f".{hashlib.sha256(name).hexdigest()[:32]}"


def _lock(path: Path, target: Path, wait: bool) -> int | None:
    """Return the handle of the locked file; None where the system or the file system knows no locks."""
    if fcntl is None:
        return None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ArtifactError(
                f"Another process is writing '{target}', and the two would get into each other's way. Wait for it, or "
                "give another place."
            ) from error
        except OSError:
            os.close(handle)
            path.unlink(missing_ok=True)
            return None
        if _is_at(handle, path):
            return handle
        os.close(handle)  # its last owner has removed it between the two calls


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _tidy(target: Path) -> None:
    pattern = re.compile(re.escape(_stem(target)) + r"\.[a-z0-9_]{8}\.partial(\.old)?")  # as `tempfile` makes them
    for path in [entry for entry in target.parent.iterdir() if pattern.fullmatch(entry.name)]:
        if path.name.endswith(".old") and not os.path.lexists(target):
            os.replace(path, target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
