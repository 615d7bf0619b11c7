"""Tensors of a checkpoint at their places in its files: read one at a time, and written one at a time.

Files are read and written with plain reads and writes: of a file that is mapped into memory, every page that was
touched would count as memory of the process.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import tensor_files
from ..errors import ArtifactError

# https://huggingface.co/docs/safetensors: length of the header as 8 bytes, the header as JSON, then the tensors.
_LENGTH = 8
_LARGEST_HEADER = 10**8  # bytes, as in safetensors
_COPIED = 2**26  # bytes at a time, by the system
_BUFFERED = 2**22  # bytes at a time, by hand
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Other file systems, or a kernel without it.
_CANNOT_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: the file.
        start: its first byte.
        dtype: of the tensor.
        shape: of the tensor.
    """

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return size_of(self.shape, self.dtype)


def size_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the bytes of a tensor."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def stored_tensors(base: Path) -> dict[str, StoredTensor]:
    """Return where every tensor of a checkpoint lies.

    Raises:
        ArtifactError: a file is missing, damaged, or lacks a tensor that the index promises.
    """
    files = tensor_files(base)
    headers = {file: _read_header(file) for file in sorted(set(files.values()))}
    found = {}
    for name, file in files.items():
        if name not in headers[file]:
            raise ArtifactError(f"'{file}' lacks {name!r}, which the index promises. Get the checkpoint again.")
        found[name] = headers[file][name]
    return found


def _read_header(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks sizes, offsets and shapes against one another
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            header = json.loads(file.read(min(length, _LARGEST_HEADER)))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"'{path}' cannot be read as safetensors ({error}); it is damaged or truncated. Get the checkpoint again."
        ) from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ArtifactError(
                f"Tensor {name!r} in '{path}' has the dtype {entry['dtype']}, which cannot be merged tensor by tensor. "
                "Use the in-memory way (in_memory=True, on the command line --in-memory)."
            )
        start = _LENGTH + length + entry["data_offsets"][0]
        found[name] = StoredTensor(path, start, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return found


class TensorReader:
    """Reads stored tensors from files that stay open meanwhile."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, FileIO] = {}

    @classmethod
    @contextmanager
    def opened(cls) -> Iterator[TensorReader]:
        """Yield a reader whose files are closed in the end."""
        with ExitStack() as stack:
            yield cls(stack)

    def file(self, path: Path) -> FileIO:
        """Return a file that is open for reading."""
        if path not in self._files:
            self._files[path] = self._stack.enter_context(FileIO(path, "rb"))
        return self._files[path]

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """Return a tensor with memory of its own.

        Raises:
            ArtifactError: the file has become shorter.
        """
        data = torch.empty(stored.size, dtype=torch.uint8)
        view, done, file = _bytes(data), 0, self.file(stored.file)
        file.seek(stored.start)
        while done < stored.size:
            count = file.readinto(view[done:])
            if not count:
                raise _shorter(stored.file)
            done += count
        return data.view(stored.dtype).reshape(stored.shape)


class TensorWriter:
    """Writes the tensors of one safetensors file in any order.

    Args:
        path: the file; it must not exist.
        tensors: shape and dtype by name.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._starts: dict[str, int] = {}
        end = 0
        # Largest dtypes first, as safetensors writes them, so that all are aligned.
        for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
            self._starts[name] = end
            end += size_of(shape, dtype)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [self._starts[name], end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _LENGTH)
        self._offset = _LENGTH + len(text)
        self._file = FileIO(path, "xb")
        try:
            self._write(memoryview(len(text).to_bytes(_LENGTH, "little") + text), 0)
            self._file.truncate(self._offset + end)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor of the shape and dtype that were announced."""
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self._write(_bytes(data), self._offset + self._starts[name])

    def copy(self, name: str, stored: StoredTensor, reader: TensorReader) -> None:
        """Write a stored tensor as it is; where the system can, without bringing it into this process' memory.

        Raises:
            ArtifactError: its file has become shorter.
        """
        source, done = reader.file(stored.file), 0
        while done < stored.size:
            place = self._offset + self._starts[name] + done
            count = self._copy_range(source, min(_COPIED, stored.size - done), stored.start + done, place)
            if not count:
                raise _shorter(stored.file)
            done += count

    def _copy_range(self, source: FileIO, count: int, start: int, place: int) -> int:
        if hasattr(os, "copy_file_range"):
            try:
                return os.copy_file_range(source.fileno(), self._file.fileno(), count, start, place)
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise
        source.seek(start)
        data = source.read(min(count, _BUFFERED)) or b""
        self._write(memoryview(data), place)
        return len(data)

    def _write(self, data: memoryview, place: int) -> None:
        self._file.seek(place)
        done = 0
        while done < len(data):
            done += self._file.write(data[done:]) or 0


def _bytes(data: torch.Tensor) -> memoryview:
    """The memory of a uint8 tensor."""
    array: Any = data.numpy()
    return memoryview(array)


def _shorter(path: Path) -> ArtifactError:
    return ArtifactError(f"'{path}' has become shorter while it was read. Get the checkpoint again.")
