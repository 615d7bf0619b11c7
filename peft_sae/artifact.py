"""Reading and writing of artefact folders: JSON beside safetensors, never half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import ArtifactError, ConfigError, suggest
from .reading import LARGEST_JSON, check_inside, check_regular, parse_json, read_text
from .scratch import held, scratch_file, scratch_folder, swap_in, tidy

_VERSIONED_PACKAGES = ("peft_sae", "peft", "torch", "transformers", "sae_lens", "transformer_lens")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that shape an artefact; missing ones are left out."""
    found = {}
    for name in _VERSIONED_PACKAGES:
        try:
            found[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            continue
    return found


def looks_like_path(text: str) -> bool:
    """Return whether a text can only be a path, and not the id of a Hub repository."""
    return Path(text).is_absolute() or text.startswith((".", "~")) or text.replace(os.sep, "/").count("/") > 1


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

    An earlier file of the name is replaced, and so is a link: nothing is written through it.

    Raises:
        ArtifactError: the target is a folder or cannot be written.
    """
    target = Path(target)
    try:
        target = target.parent.resolve() / target.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with held(target, wait=True):
            scratch = scratch_file(target)
            try:
                yield scratch
                _make_readable(scratch)
                os.replace(scratch, target)
            finally:
                scratch.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise _cannot_write(target, error) from error


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


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON with a stable order of keys."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path, *, schema: str, newest: int, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Read the JSON file of an artefact and check its kind and schema version.

    Args:
        path: the file.
        schema: the kind of artefact, as its `schema` entry must say.
        newest: the newest schema version that this code reads.
        largest: bytes that it may have.

    Raises:
        ArtifactError: the file is missing, not JSON, too large, a link out of its folder, of another kind, or of a
            newer schema.
    """
    check_inside(path, path.parent)
    try:
        data = parse_json(read_text(path, largest=largest))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"'{path}' does not exist, so there is no {schema} in '{path.parent}'. Check the path."
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"'{path}' cannot be read as JSON ({error}); it is damaged or truncated. Write it again."
        ) from error
    if not isinstance(data, dict) or data.get("schema") != schema:
        raise ArtifactError(f"'{path}' does not describe a {schema}. Check the path.")
    found = data.get("schema_version")
    if type(found) is not int or not 1 <= found <= newest:
        raise ArtifactError(
            f"'{path}' has schema version {found!r}, and this peft_sae reads versions 1 to {newest}. "
            "Upgrade peft_sae with `pip install -U peft-sae`."
        )
    return data


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors; tensors that share memory are written apart.

    Raises:
        ArtifactError: the file cannot be written.
    """
    from safetensors.torch import save_file

    check_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise ArtifactError(f"Cannot write '{path}' ({error}). Check the space and the rights there.") from error


def read_tensors(path: Path, expected: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, torch.Tensor]:
    """Read tensors from a safetensors file after checking names, shapes and dtypes in its header.

    Args:
        path: the file.
        expected: name to shape and dtype. Every name must be there, and no other.

    Raises:
        ArtifactError: the file is missing, truncated, or a link out of its folder, or a tensor is missing, unexpected,
            of another shape or dtype, or not finite.
    """
    from safetensors import safe_open

    check_inside(path, path.parent)
    try:
        check_regular(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_names(path, set(file.keys()), set(expected))
            for name, (shape, dtype) in expected.items():
                _check_header(path, name, file.get_slice(name), shape, dtype)
            tensors = {name: file.get_tensor(name) for name in expected}
    except FileNotFoundError as error:
        raise ArtifactError(f"'{path}' does not exist, so the folder is incomplete. Write it again.") from error
    except (SafetensorError, OSError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"'{path}' cannot be read as safetensors ({error}); it is damaged or truncated. Write it again."
        ) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"Tensor '{name}' in '{path}' holds NaN or infinity. Write the file again.")
    return tensors


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    missing, surplus = sorted(expected - found), sorted(found - expected)
    if missing or surplus:
        raise ArtifactError(
            f"'{path}' lacks the tensors {missing} and has unexpected ones {surplus}; it does not fit "
            "the JSON file beside it. Write the folder again."
        )


_HEADER_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}


def _check_header(path: Path, name: str, header: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
    if list(header.get_shape()) != list(shape) or header.get_dtype() != _HEADER_DTYPES[dtype]:
        raise ArtifactError(
            f"Tensor '{name}' in '{path}' is {header.get_dtype()} {list(header.get_shape())}, and "
            f"{_HEADER_DTYPES[dtype]} {list(shape)} was expected. Write the folder again."
        )


def digest(tensors: Mapping[str, torch.Tensor], description: Any = None) -> str:
    """Return the SHA-256 of named tensors and of JSON-serialisable data, as 64 hexadecimal digits."""
    sha = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
