"""Merging a checkpoint piece by piece, so that no more than one module's weights are in memory."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import build_skeleton
from ..errors import MismatchError
from .conversion import Conversion, Group
from .plan import Plan, Unit, is_tied, make_plan
from .tensor_file import StoredTensor, TensorReader, TensorWriter, stored_tensors
from .updates import attach, check_together, merge_layers, part_tied, resize_for

_COMPARED = 2**22  # elements at a time
_AHEAD = 1  # merged modules that wait to be written


class StreamedMerge:
    """A merge that is planned and can be carried out.

    Args:
        base: folder of the base model.
        adapters: their tensors by folder, in the order in which they are merged.
        factors: of their updates.
        dtype: of the merged checkpoint; None for that of the base.

    Attributes:
        plan: what will be written.
        tokens: the new number of tokens, if the adapters changed it.
        tied: whether input and output embeddings share their weights, if the configuration ties them; else None.

    Raises:
        MismatchError, ArtifactError, ConfigError: base and adapters do not belong together, or not in this way.
    """

    def __init__(
        self,
        base: Path,
        adapters: Mapping[str, Mapping[str, torch.Tensor]],
        factors: Mapping[str, float],
        dtype: torch.dtype | None,
    ) -> None:
        self._stored = stored_tensors(base)
        self._model = build_skeleton(base)
        self._conversion = Conversion(self._model, self._stored)
        with TensorReader.opened() as reader:
            self._untie(reader)
            self.tokens = resize_for(self._model, adapters.values())
            self._fill(reader)
        own = self._model.state_dict(keep_vars=True)  # kept, so that their identities stay theirs
        updates = [attach(self._model, name, adapters[name], factors[name], empty=True) for name in adapters]
        check_together(updates, adapters)
        self._parted = part_tied(self._model, updates)
        self.plan: Plan = make_plan(self._model, self._conversion, self._stored, updates, own, self._parted, dtype)
        ties = getattr(self._model.config.get_text_config(), "tie_word_embeddings", False)
        self.tied = is_tied(self._model) if ties else None
        self._owners = _owners(self._model)

    @property
    def unknown(self) -> list[str]:
        """Tensors of the base that its class has no place for; they are not written, as `save_pretrained` would not."""
        return self._conversion.unknown

    def write(self, folder: Path, shards: Mapping[str, list[str]]) -> Iterator[int]:
        """Write the merged tensors and yield the bytes of every piece.

        Args:
            folder: where to write.
            shards: names of the merged checkpoint's tensors by file.
        """
        outputs = self.plan.outputs
        with TensorReader.opened() as merging, TensorReader.opened() as copying, ExitStack() as stack:
            writers = {}
            for file, names in shards.items():
                writer = TensorWriter(folder / file, {name: outputs[name] for name in names})
                stack.callback(writer.close)
                writers.update(dict.fromkeys(names, writer))
            # Files are copied and written beside the arithmetic; both leave Python alone meanwhile.
            pool = ThreadPoolExecutor(max_workers=1)
            stack.callback(pool.shutdown, cancel_futures=True)
            jobs: deque[Future[int]] = deque()
            held: deque[Future[int]] = deque()
            for unit in self.plan.units:
                copied = self._copied(unit)
                for name, stored in copied.items():
                    jobs.append(pool.submit(_copy, writers[name], name, stored, copying))
                if not copied:
                    merged = self._merge(unit, merging)
                    held.append(pool.submit(_write, writers, merged))
                    jobs.append(held[-1])
                    del merged
                if len(held) > _AHEAD:
                    held.popleft().result()
                while jobs and jobs[0].done():
                    yield jobs.popleft().result()
            for job in jobs:
                yield job.result()

    def _copied(self, unit: Unit) -> dict[str, StoredTensor]:
        """What a unit takes over as it is stored, by the names that it gets; nothing if anything of it changes."""
        if unit.layers or set(unit.names) & set(self.plan.values):
            return {}
        sources = [name for group in unit.groups for name in group.names]
        if len(sources) == len(unit.outputs) == 1 and unit.groups[0].transform is None:
            pairs = {unit.outputs[0]: self._stored[sources[0]]}
        elif set(sources) == set(unit.outputs):  # joined for the model and parted again for the file
            pairs = {name: self._stored[name] for name in sources}
        else:
            return {}
        same = all(self.plan.outputs[name] == (stored.shape, stored.dtype) for name, stored in pairs.items())
        return pairs if same else {}

    def _merge(self, unit: Unit, reader: TensorReader) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for group in unit.groups:
            for target, tensor in self._load(group, reader).items():
                tensors.update(dict.fromkeys(self.plan.places.get(target, ()), tensor))
        tensors.update({name: self.plan.values[name] for name in unit.names if name in self.plan.values})
        if unit.layers:
            with self._filled(unit.names, tensors):
                merge_layers(unit.layers)
                tensors = {name: self._find(name).detach() for name in unit.names}
        written = {
            name: tensors[name].to(self.plan.dtypes[name])
            for name in unit.names
            if name in self.plan.saved & set(tensors)
        }
        return self._conversion.save(written)

    def _load(self, group: Group, reader: TensorReader) -> dict[str, torch.Tensor]:
        return self._conversion.load(group, lambda name: reader.read(self._stored[name]))

    def _find(self, name: str) -> torch.Tensor:
        module, key = self._owners[name]
        found = module._parameters.get(key)
        return module._buffers[key] if found is None else found  # type: ignore[return-value]

    @contextmanager
    def _filled(self, names: list[str], tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Put tensors into the model; those that were one stay one."""
        before = {name: self._find(name) for name in names}
        made: dict[int, torch.Tensor] = {}
        for name, old in before.items():
            if name in tensors and id(old) not in made:
                new = tensors[name].clone() if name in {*self.plan.values, *self._parted} else tensors[name]
                made[id(old)] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        try:
            for name, old in before.items():
                self._set(name, made[id(old)])
            yield
        finally:
            for name, old in before.items():
                self._set(name, old)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        module, key = self._owners[name]
        if isinstance(tensor, nn.Parameter):
            module._parameters[key] = tensor
        else:
            module._buffers[key] = tensor

    def _fill(self, reader: TensorReader) -> None:
        """Give the model values: the norms theirs, all else zeros that take no memory.

        PEFT puts an adapter where its module is, which must not be the meta device; and what a protected feature looks
        like to a module depends on the norm in front of it.
        """
        owners = _owners(self._model)
        norms = {}
        for group in self._conversion.groups:
            modules = {type(owners[name][0]).__name__.lower() for name in group.targets}
            if any("norm" in kind for kind in modules):
                norms.update(self._load(group, reader))
        made: dict[int, torch.Tensor] = {}
        for name, (module, key) in owners.items():
            kept = module._parameters if key in module._parameters else module._buffers
            old = kept[key]
            if old is None:
                continue
            if id(old) not in made:
                value = norms.get(name, torch.zeros((), dtype=_full(old.dtype)).expand(old.shape))
                made[id(old)] = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
            kept[key] = made[id(old)]  # type: ignore[assignment]

    def _untie(self, reader: TensorReader) -> None:
        """Part tensors that the configuration ties, and that differ in the checkpoint, as `from_pretrained` does."""
        by_object: dict[int, list[Group]] = {}
        tensors = self._model.state_dict(keep_vars=True)
        for group in self._conversion.groups:
            if group.transform is None:
                by_object.setdefault(id(tensors[group.targets[0]]), []).append(group)
        for first, *others in by_object.values():
            for other in others:
                one, two = (self._stored[group.names[0]] for group in (first, other))
                if _equal(one, two, reader):
                    self._conversion.groups.remove(other)
                    continue
                (name,) = other.targets
                module, key = _owners(self._model)[name]
                module._parameters[key] = nn.Parameter(torch.empty_like(tensors[name]), requires_grad=False)
                self._model.all_tied_weights_keys.pop(name, None)


def _copy(writer: TensorWriter, name: str, stored: StoredTensor, reader: TensorReader) -> int:
    writer.copy(name, stored, reader)
    return stored.size


def _write(writers: Mapping[str, TensorWriter], tensors: Mapping[str, torch.Tensor]) -> int:
    for name, tensor in tensors.items():
        writers[name].write(name, tensor)
    return sum(tensor.nbytes for tensor in tensors.values())


def _full(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _equal(one: StoredTensor, two: StoredTensor, reader: TensorReader) -> bool:
    if one.shape != two.shape:
        raise MismatchError(
            f"Two tied tensors of the checkpoint have the shapes {one.shape} and {two.shape}. Get the checkpoint again."
        )
    if one.dtype != two.dtype:
        return False
    count, item = one.size // one.dtype.itemsize, one.dtype.itemsize
    for start in range(0, count, _COMPARED):
        length = min(_COMPARED, count - start)
        parts = [
            reader.read(StoredTensor(stored.file, stored.start + start * item, stored.dtype, (length,)))
            for stored in (one, two)
        ]
        if not torch.equal(*parts):
            return False
    return True


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Module and key of every tensor by its name; under every name, where it has several."""
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key in (*module._parameters, *module._buffers):
            found[f"{prefix}.{key}" if prefix else key] = (module, key)
    return found


def write_index(path: Path, weight_map: Mapping[str, str], *, size: int, parameters: int) -> None:
    """Write the index of a checkpoint in several files, as transformers does."""
    metadata = {"total_parameters": parameters, "total_size": size}
    text = json.dumps({"metadata": metadata, "weight_map": dict(weight_map)}, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")
