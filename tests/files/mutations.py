"""Changes of a file's content: bytes, JSON values, tensors and their headers, or something else in the file's place."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from dataclasses import dataclass

from hypothesis import strategies as st

OUTSIDE = "outside"  # a folder beside the artefact, full of files that would fit
_DEEP, _HUGE = "a place for brackets", "a place for digits"
_STRINGS = ["", "x", "none", "auto", "\x00", "\ud800", "a" * 50_000, "(a", ".*", f"../{OUTSIDE}", f"../../{OUTSIDE}"]
_NUMBERS = [0, 1, -1, 2, 3, 7, 64, 2**31, 2**40, 2**63, 10**30, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf")]
_OTHERS = [None, True, False, [], {}, [[]], [None], {"": None}, {"x": [1]}, [1, "x"], _DEEP, _HUGE]
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "C64": 8}
_FORMATS = {"F64": "<d", "F32": "<f", "I64": "<q"}


class Payload:
    """Leaves a mark in a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@dataclass(frozen=True, repr=False)
class Change:
    """What stands in a file's place.

    `content` is bytes, or a word for what is no file: `fifo`, `folder`, `link` (out of the folder), `nothing`.
    `signed` says that the digest is to be made fit again, as by somebody who knows the format.
    """

    what: str
    content: bytes | str
    signed: bool = False

    def _repr_pretty_(self, printer, cycle):
        printer.text(f"Change({self.what!r:.300}, {self.content!r:.40}{', signed' if self.signed else ''})")


@st.composite
def changes(draw, original: bytes, *, absolute: str, kind: str, signed: bool = False):
    """Changes of one file.

    Args:
        original: its content.
        absolute: an absolute path out of the artefact.
        kind: `json`, `tensors`, `state` or `text`.
        signed: whether half of the changes of values are to be signed.
    """
    sort = draw(st.sampled_from(["value"] * 10 + ["bytes"] * 3 + ["place"]))
    if sort == "place":
        content = draw(st.sampled_from(["fifo", "folder", "link", "nothing", "pickle", "empty"]))
        known = {"pickle": pickle.dumps(Payload(absolute)), "empty": b""}
        return Change("place", known.get(content, content))
    if sort == "bytes" or kind == "text":
        return Change("bytes", draw(changed_bytes(original)))
    sign = signed and draw(st.booleans())
    if kind == "json":
        return Change(*draw(changed_json(original, absolute)), sign)
    if kind == "state":  # most of it is JSON in the header
        return Change(*draw(changed_tensors(original, absolute)), sign)
    return Change(*draw(changed_tensors(original)), sign)


@st.composite
def changed_bytes(draw, original: bytes):
    """Flipped, cut, inserted, repeated or removed bytes."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        if draw(st.booleans()):
            place %= 400  # headers and the beginnings of text decide most
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat", "remove"])):
            case "flip" if place < len(content):
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[place:]
            case "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=9))
            case "repeat":
                content[place:place] = content[place : place + draw(st.integers(1, 40))]
            case "remove":
                del content[place : place + draw(st.integers(1, 40))]
    return bytes(content)


def _places(value, path=()):
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in entries:
        yield from _places(child, (*path, key))


def _at(value, path):
    for key in path:
        value = value[key]
    return value


def values(absolute: str):
    """Values that stand nowhere in a good file, or not there."""
    return st.sampled_from([*_STRINGS, *_NUMBERS, *_OTHERS, absolute])


@st.composite
def changed_json(draw, original: bytes, absolute: str):
    """JSON with other values, keys more, fewer or twice, or nested deeply."""
    data = json.loads(original)
    twice, told = "", []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = list(_places(data))
        # By depth first: else long lists and tables would take all the changes.
        depth = draw(st.sampled_from(sorted({len(place) for place in places})))
        path = draw(st.sampled_from([place for place in places if len(place) == depth]))
        old = _at(data, path)
        told.append(path)
        match draw(st.sampled_from(["set", "set", "set", "shift", "remove", "add", "swap", "twice"])):
            case "shift" if isinstance(old, (int, float)) and abs(old) < 1e300:
                new = old + draw(st.sampled_from([1, -1, 1e-9, 0.5]))
            case "swap":
                new = copy.deepcopy(_at(data, draw(st.sampled_from(places))))
            case "add" if isinstance(old, dict):
                new = {**old, draw(st.sampled_from(["x", "", "lora_alpha", *list(old)[:2]])): draw(values(absolute))}
            case "add" if isinstance(old, list):
                new = [*old, draw(st.sampled_from(old) if old else st.just(0))]
            case "remove" if path:
                parent = _at(data, path[:-1])
                del parent[path[-1]]
                continue
            case "twice" if isinstance(data, dict) and data:
                key = draw(st.sampled_from(list(data)))
                twice = f"{json.dumps(key)}: {_text(draw(values(absolute)))}, "
                continue
            case _:
                new = copy.deepcopy(draw(values(absolute)))
        told.append(new)
        if path:
            _at(data, path[:-1])[path[-1]] = new
        else:
            data = new
        if not isinstance(data, (dict, list)):
            break
    text = _text(data)
    text = text[0] + twice + text[1:] if text.startswith("{") and len(text) > 2 else text
    return f"{twice[:80]}{told!r:.250}", text.encode()


def _text(data):
    deep = "[" * 5000 + "]" * 5000
    return json.dumps(data).replace(f'"{_DEEP}"', deep).replace(f'"{_HUGE}"', "9" * 5000)


def parse(content: bytes):
    """The header of safetensors and what follows it, read without the library."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def build(header, data: bytes, *, length=None) -> bytes:
    """Safetensors of a header, which may lie."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _rebuilt(tensors, metadata) -> bytes:
    """Safetensors of name to dtype, shape and bytes, without gaps."""
    header = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, content) in sorted(tensors.items(), key=lambda entry: (-_DTYPES[entry[1][0]], entry[0])):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return build(header, data)


@st.composite
def changed_tensors(draw, original: bytes, absolute=None):
    """Safetensors with other values, names, shapes or dtypes, or a header that lies; with JSON if a path is given."""
    header, data = parse(original)
    known = metadata = header.pop("__metadata__", None)
    tensors = {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }
    told = []
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        if not tensors:
            break
        name = draw(st.sampled_from(sorted(tensors)))
        dtype, shape, content = tensors[name]
        sorts = ["number", "number", "number", "names", "shape", "dtype", "lie", *["metadata"] * (7 if absolute else 1)]
        sort = draw(st.sampled_from(sorts))
        told.append((sort, name))
        match sort:
            case "number" if content and dtype in _FORMATS:
                place = draw(st.integers(0, len(content) // _DTYPES[dtype] - 1)) * _DTYPES[dtype]
                (old,) = struct.unpack_from(_FORMATS[dtype], content, place)
                changed = bytearray(content)
                told.append((old, draw(_number(dtype, old))))
                struct.pack_into(_FORMATS[dtype], changed, place, told[-1][1])
                tensors[name] = (dtype, shape, bytes(changed))
            case "names":
                other = draw(st.sampled_from([*sorted(tensors), "x", "", "../x", "0.basis\x00"]))
                taken = tensors.pop(name)
                if other in tensors:
                    tensors[name] = tensors[other]
                if draw(st.booleans()):
                    tensors[other] = taken
            case "shape":
                tensors[name] = draw(_reshaped(dtype, shape, content))
            case "dtype":
                new = draw(st.sampled_from(sorted(_DTYPES)))
                count = len(content) // _DTYPES[dtype]
                size = count * _DTYPES[new]
                tensors[name] = (new, shape, (content * 8)[:size])
            case "metadata" if known and absolute and draw(st.integers(0, 9)):
                key = draw(st.sampled_from(sorted(known)))
                note, changed = draw(changed_json(known[key].encode(), absolute))
                metadata = {key: changed.decode()}
                told.append(note)
            case "metadata":
                metadata = draw(
                    st.sampled_from([None, {}, {"format": "np"}, {"x": "y"}, {"x": 1}, [], {"format": "pt"}])
                )
            case "lie":
                return repr(told), draw(_lying(_rebuilt(tensors, metadata), name))
    return repr(told), _rebuilt(tensors, metadata)


def _number(dtype, old):
    if dtype == "I64":
        return st.sampled_from([0, -1, 1, 2**31, 2**40, 2**62, -(2**63), min(old + 1, 2**62), max(old - 1, -(2**62))])
    largest = 3e38 if dtype == "F32" else 1e308
    near = [old + 1, old - 1, 2 * old, -old] if abs(old) < 1e37 else []
    return st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, largest, -largest, float("nan"), float("-inf"), *near])


@st.composite
def _reshaped(draw, dtype, shape, content):
    size = _DTYPES[dtype]
    match draw(st.sampled_from(["turned", "flat", "shorter", "longer", "nothing", "deeper"])):
        case "turned":
            return dtype, shape[::-1], content
        case "flat":
            return dtype, [len(content) // size], content
        case "shorter" if shape and shape[0] > 1:
            return dtype, [shape[0] - 1, *shape[1:]], content[: len(content) // shape[0] * (shape[0] - 1)]
        case "longer" if shape and shape[0]:
            return dtype, [shape[0] + 1, *shape[1:]], content + content[: len(content) // shape[0]]
        case "nothing":
            return dtype, [0, *shape[1:]], b""
    return dtype, [1, *shape], content


@st.composite
def _lying(draw, content: bytes, name: str):
    header, data = parse(content)
    if draw(st.integers(0, 4)) == 0:
        return build(header, data, length=draw(st.sampled_from([0, 1, 10**8, 10**9, 2**63, 2**64 - 1])))
    entry = header.get(name) or next(iter(header.values()))
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    lies = {
        "dtype": ["F32", "F64", "I64", "F128", "", None, 5],
        "shape": [[2**40], [2**62, 2**62], [2**64], [-1], [], None, "x", [1.5], [0, 2**63], [1] * 5000],
        "data_offsets": [[0, 2**62], [2**62, 2**63], [8, 0], [-8, 8], [0], [0, 0], [0, 8], None, "x"],
    }
    entry[key] = draw(st.sampled_from(lies[key]))
    return build(header, data)
