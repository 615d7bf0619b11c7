"""Loading of SAEs: sae-lens reads the weights of releases and folders."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..artifact import looks_like_path
from ..errors import ArtifactError, ConfigError, MismatchError
from .handle import SaeHandle, as_handles, check_distinct, make_handle

if TYPE_CHECKING:
    from sae_lens import SAE

__all__ = ["SaeHandle", "as_handles", "check_distinct", "load_saes", "make_handle"]

_SAE_CONFIG_FILE = "cfg.json"
# sae-lens adds up the decoders of all layers that such an SAE writes to, so it has no directions of one place.
_CROSS_LAYER_LOADERS = ("mntss_clt_layer_transcoder",)


def load_saes(
    source: str | Path | SAE[Any] | Iterable[SAE[Any]],
    *,
    ids: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> list[SaeHandle]:
    """Load SAEs for use on a plain Hugging Face model.

    Args:
        source: the name of a sae-lens release (`"gemma-scope-2b-pt-res-canonical"`), a folder in
            sae-lens' format or a folder of such folders, or SAE objects.
        ids: the SAEs of a release, or the names of the sub-folders, to load.
        layers: decoder blocks to load, instead of `ids`. In a release each block must have one SAE
            only; otherwise name them with `ids`.
        device: where to put the weights.
        dtype: dtype to load them in, for example `"bfloat16"`; by default as stored (`"float32"`
            for a release).

    Returns:
        One handle per SAE, in the order of `ids` or of the blocks.

    Raises:
        ConfigError: unknown release or id, or `layers` does not say which SAE is meant.
        ArtifactError: the folder holds no SAE or a damaged one.
        MismatchError: an SAE's hook point or normalisation cannot be honoured, or two SAEs have the
            same hook point.
    """
    if ids is not None and layers is not None:
        raise ConfigError(f"Both ids={list(ids)} and layers={list(layers)} are given. Give one of them.")
    if not isinstance(source, (str, Path)):
        handles = [make_handle(sae) for sae in ([source] if isinstance(source, torch.nn.Module) else source)]
        handles = _pick_handles(handles, ids, layers)
    elif Path(source).is_dir():
        handles = _load_folder(Path(source), ids, layers, device, dtype)
    else:
        handles = _load_release(str(source), ids, layers, device, dtype or "float32")
    check_distinct(handles)
    return handles


def _load_folder(
    folder: Path, ids: Sequence[str] | None, layers: Sequence[int] | None, device: str, dtype: str | None
) -> list[SaeHandle]:
    if (folder / _SAE_CONFIG_FILE).is_file():
        return _pick_handles([_load_from_disk(folder, device, dtype)], ids, layers)
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{_SAE_CONFIG_FILE}"))}
    if not found:
        raise ArtifactError(
            f"'{folder}' holds no SAE: neither it nor its sub-folders have a {_SAE_CONFIG_FILE}. Give a folder "
            "written by sae-lens, or the name of a release."
        )
    unknown = sorted(set(ids or ()) - set(found))
    if unknown:
        raise ConfigError(f"'{folder}' has no SAEs named {unknown}. It has {sorted(found)}.")
    chosen = found.values() if ids is None else [found[name] for name in ids]
    return _pick_handles([_load_from_disk(path, device, dtype) for path in chosen], None, layers)


def _load_from_disk(folder: Path, device: str, dtype: str | None) -> SaeHandle:
    from sae_lens import SAE

    try:
        with _quiet():
            sae = SAE.load_from_disk(folder, device=device, dtype=dtype)
    except Exception as error:  # sae-lens raises whatever the damaged file leads it into
        raise ArtifactError(
            f"The SAE in '{folder}' cannot be loaded ({error!r}). Write it again with sae-lens' own saving."
        ) from error
    return make_handle(sae, name=folder.name)


def _load_release(
    release: str, ids: Sequence[str] | None, layers: Sequence[int] | None, device: str, dtype: str
) -> list[SaeHandle]:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    chosen = ids_of_release(release, ids, layers)
    entry = get_pretrained_saes_directory()[release]
    handles = []
    for sae_id in chosen:
        _check_not_cross_layer(release, sae_id, entry)
        try:
            with _quiet():
                sae = SAE.from_pretrained(release, sae_id, device=device, dtype=dtype)
        except Exception as error:  # sae-lens passes on whatever the network or a damaged file leads it into
            raise ArtifactError(
                f"The SAE {sae_id!r} of release {release!r} cannot be loaded ({error!r}). Check the network and the "
                "Hugging Face cache."
            ) from error
        neuronpedia_id = entry.neuronpedia_id.get(sae_id)
        handles.append(make_handle(sae, name=f"{release}/{sae_id}", neuronpedia_id=neuronpedia_id))
    return handles


def ids_of_release(release: str, ids: Sequence[str] | None, layers: Sequence[int] | None) -> dict[str, str]:
    """Return the SAEs of a release that are meant, with their paths in it, as sae-lens' directory has them.

    Raises:
        ConfigError: unknown release or id, or `layers` does not say which SAE is meant.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory:
        if looks_like_path(release):
            raise ConfigError(
                f"There is no folder '{release}' (the working directory is '{Path.cwd()}'). Check the path."
            )
        raise ConfigError(
            f"{release!r} is neither a folder nor a release that the installed sae-lens knows. Releases with "
            f"similar names: {_similar(release, directory)}."
        )
    entry = directory[release]
    chosen = list(ids) if ids is not None else _ids_of_layers(release, list(entry.saes_map), layers)
    unknown = sorted(set(chosen) - set(entry.saes_map))
    if unknown:
        raise ConfigError(
            f"Release {release!r} has no SAEs {unknown}. Similar ids: {_similar(unknown[0], entry.saes_map)}."
        )
    return {sae_id: str(entry.saes_map[sae_id]) for sae_id in chosen}


def _check_not_cross_layer(release: str, sae_id: str, entry: Any) -> None:
    if entry.conversion_func in _CROSS_LAYER_LOADERS or "clt" in re.split(r"[^a-z]+", entry.saes_map[sae_id].lower()):
        raise MismatchError(
            f"{sae_id!r} of release {release!r} is a cross-layer transcoder: its features write to many blocks, and "
            "sae-lens loads the sum of these decoders, so no direction belongs to one place. Use a release of SAEs or "
            "of transcoders of single layers."
        )


def _ids_of_layers(release: str, known: list[str], layers: Sequence[int] | None) -> list[str]:
    if layers is None:
        raise ConfigError(
            f"Release {release!r} has {len(known)} SAEs. Say which with ids=[...] or layers=[...], for example "
            f"ids={known[:2]}."
        )
    chosen = []
    for layer in sorted(set(layers)):
        pattern = re.compile(rf"(?:layer_?|blocks\.|^l){layer}(?!\d)")
        matches = [sae_id for sae_id in known if pattern.search(sae_id)]
        if len(matches) != 1:
            raise ConfigError(
                f"Layer {layer} of release {release!r} has {len(matches)} SAEs ({matches[:5]}), and exactly one is "
                "needed. Name them with ids=[...]."
            )
        chosen.append(matches[0])
    return chosen


def _pick_handles(handles: list[SaeHandle], ids: Sequence[str] | None, layers: Sequence[int] | None) -> list[SaeHandle]:
    if ids is not None:
        by_name = {handle.identity.name: handle for handle in handles}
        unknown = sorted(set(ids) - set(by_name))
        if unknown:
            raise ConfigError(f"There are no SAEs named {unknown}. There are {sorted(by_name)}.")
        return [by_name[name] for name in ids]
    handles = sorted(handles, key=lambda handle: handle.identity.site.block)
    if layers is None:
        return handles
    missing = sorted(set(layers) - {handle.identity.site.block for handle in handles})
    if missing:
        raise ConfigError(
            f"No SAE belongs to the layers {missing}. There are SAEs at "
            f"{[handle.identity.hook_name for handle in handles]}."
        )
    return [handle for handle in handles if handle.identity.site.block in layers]


def _similar(name: str, known: Iterable[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, list(known), n=5, cutoff=0.3)


class _quiet(warnings.catch_warnings):
    """Silences sae-lens' advice to load the model its way: `center_input` does that here."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
