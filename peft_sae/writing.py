"""Writing of files and folders: whole or not at all, never over what is not ours, and with room for it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import ArtifactError, ConfigError, suggest
from .scratch import held, scratch_folder, swap_in, tidy


@contextmanager
def replace_folder(target: str | Path, *, owned: Collection[str] = (), wait: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` when the block ends without an error.

    Killed at any moment, it leaves the earlier version or the new one, and what lies about beside it goes the next
    time that the target is written. Nothing is forced to the disk (fsync): that would double the time of a large merge
    for the sake of power failures alone, after which sizes and digests tell what was lost.

    Args:
        target: folder to write. It may be missing, empty, or hold an earlier artefact of the kind.
        owned: names of the files that this kind of artefact consists of. A folder that holds anything else
            is never replaced.
        wait: wait for another process that writes the same target, instead of stopping.

    Raises:
        ArtifactError: the target is a file or a foreign folder, cannot be written, or is being written by another
            process.
    """
    target = check_target(target, owned=owned)
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(target, wait=wait))
            check_target(target, owned=owned)
            scratch = scratch_folder(target)
        except OSError as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"Cannot write beside '{target}' ({error}). Give a writable folder.") from error
        try:
            yield scratch
            _make_readable(scratch)
            check_target(target, owned=owned)  # again: work may have appeared there in the meantime
            swap_in(scratch, target)
        except (OSError, SafetensorError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise _cannot_write(target, error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def replace_file(target: str | Path) -> Iterator[Path]:
    """Yield an empty file that takes the place of `target` when the block ends without an error.

    An earlier file of the name is replaced, and so is a link: nothing is written through it. The file is in a folder of
    its own, since libraries put temporary files of theirs beside what they write (safetensors does), which are to go
    with it when the process is killed.

    Raises:
        ArtifactError: the target is a folder or cannot be written.
    """
    target = Path(target)
    try:
        target = target.parent.resolve() / target.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with held(target, wait=True):
            folder = scratch_folder(target)
            try:
                scratch = folder / "file"
                scratch.touch(0o600)
                yield scratch
                _make_readable(scratch)
                os.replace(scratch, target)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise _cannot_write(target, error) from error


@contextmanager
def alone(target: str | Path) -> Iterator[None]:
    """Keep other processes that do the same from a file or folder until the block ends; its parents are made.

    Args:
        target: the file or folder, which need not be there.

    Raises:
        ArtifactError: another process is at it, or the place cannot be written.
    """
    target = Path(target)
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(target.parent.resolve() / target.name))
        except OSError as error:
            if isinstance(error, ArtifactError):
                raise
            raise _cannot_write(target, error) from error
        yield


def discard(target: str | Path) -> None:
    """Remove a file or folder that nobody needs any more, with what killed processes have left of it.

    Args:
        target: the file or folder; if there is none, that is no error.
    """
    target = Path(target)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target, ignore_errors=True)
    else:
        target.unlink(missing_ok=True)
    tidy_up(target)


def tidy_up(target: str | Path) -> None:
    """Remove what killed processes have left beside a file or folder, if nobody writes it now."""
    target = Path(target)
    if target.parent.is_dir():
        tidy(target.parent.resolve() / target.name)


def check_writable(target: str | Path) -> None:
    """Check that something can be written beside a path, before any long work.

    Raises:
        ArtifactError: it cannot.
    """
    place = Path(target).absolute().parent
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):  # without a name where the system can, so a kill leaves nothing
            pass
    except OSError as error:
        raise ArtifactError(f"Nothing can be written at '{target}' ({error}). Give another place.") from error


def check_space(folder: str | Path, needed: int) -> None:
    """Check that there is room for what is to be written, before any long work.

    Args:
        folder: a folder on the disk in question.
        needed: bytes.

    Raises:
        ArtifactError: there is not.
    """
    free = _free(Path(folder))
    if free is not None and needed > free:
        raise ArtifactError(
            f"'{folder}' has {_megabytes(free)} free, and {_megabytes(needed)} are needed. Make room there, or give "
            "another place."
        )


def _cannot_write(target: Path, error: Exception) -> ArtifactError:
    reason = str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in reason
    free = _free(target.parent) if full else None
    room = "" if free is None else f"; {_megabytes(free)} are free there now"
    remedy = "Make room there, or give another place." if full else "Check the path, the space and the rights."
    return ArtifactError(f"Cannot write '{target}' ({reason}{room}), and nothing is left of it. {remedy}")


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def check_target(target: str | Path, *, owned: Collection[str] = ()) -> Path:
    """Check that a folder may be written, before any long work, and return its resolved path.

    Args:
        target: the folder; a link stays one, what it points to is replaced.
        owned: names of the files that it may hold already.

    Raises:
        ArtifactError: it is a file, or holds something else.
    """
    try:
        target = Path(target).resolve()
        foreign = sorted({path.name for path in target.iterdir()} - set(owned)) if target.is_dir() else []
        if not target.is_file() and not foreign:
            return target
    except OSError as error:
        raise ArtifactError(f"'{str(target)[:200]}' cannot be written ({error}). Give another folder.") from error
    raise ArtifactError(
        f"'{target}' exists{f' and holds {foreign[:3]}' if foreign else ' and is a file'}; writing there would "
        "destroy it. Give another folder or remove this one."
    )


def _make_readable(path: Path) -> None:
    """Give files and folders the usual rights; temporary ones and safetensors files are made private."""
    mask = os.umask(0)
    os.umask(mask)
    for entry in (path, *(path.rglob("*") if path.is_dir() else ())):
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)


def check_suffix(path: str | Path, suffixes: Sequence[str]) -> None:
    """Check that the suffix of a file says in which format it is to be written, before any long work.

    Args:
        path: the file.
        suffixes: those that are known, with their dots.

    Raises:
        ConfigError: unknown suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise ConfigError(
            f"'{path}' has the suffix {suffix!r}, so its format is unknown.{suggest(suffix, suffixes)} Use one of "
            f"{', '.join(suffixes)}."
        )


def write_text(target: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all. An earlier file of the name is replaced.

    Raises:
        ArtifactError: the target is a folder or cannot be written.
    """
    with replace_file(target) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
