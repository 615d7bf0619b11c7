"""Where the SAEs of a source belong, told before their weights are loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArtifactError, ConfigError
from .load import ids_of_release

_CONFIG_FILE = "cfg.json"
# How releases write a block and a kind of site in the names of their SAEs.
_BLOCK = re.compile(r"(?:layer_?|blocks\.|(?<![a-z])l)(\d+)(?!\d)", re.IGNORECASE)
# Where an id is the name of a hook point, it is taken at its word; some follow it by the SAE's size or number.
_HOOK = re.compile(r"blocks\.\d+\.(?:(?:attn|mlp|ln1|ln2)\.)?hook_[a-z]+(?:_[a-z]+)?(?![a-z])")
_ELSEWHERE = re.compile(r"embed", re.IGNORECASE)
_KINDS = (
    (re.compile(r"transcoder|(?<![a-z])tc(?![a-z])", re.IGNORECASE), "hook_mlp_out"),
    (re.compile(r"(?<![a-z])att(?![a-z])"), "attn.hook_z"),
    (re.compile(r"mlp|L\d+M-"), "hook_mlp_out"),
    (re.compile(r"(?<![a-z])res(?:id)?(?![a-z])|L\d+R-", re.IGNORECASE), "hook_resid_post"),
)


@dataclass(frozen=True)
class ExpectedPlace:
    """Where an SAE belongs.

    Attributes:
        name: the SAE's.
        hook_name: TransformerLens name of its hook point.
        by_name: whether that is read off its name, and not from its configuration.
    """

    name: str
    hook_name: str
    by_name: bool


def expected_places(
    source: str | Path, *, ids: Sequence[str] | None = None, layers: Sequence[int] | None = None
) -> list[ExpectedPlace]:
    """Return where the SAEs belong that `load_saes` would load, without loading any or using the network.

    Args:
        source: a folder in sae-lens' format or of such folders, or the name of a release.
        ids: see `load_saes`.
        layers: see `load_saes`.

    Raises:
        ConfigError: unknown release or id, or the place is not in an SAE's name.
        ArtifactError: the folder holds no SAE.
    """
    if Path(source).is_dir():
        places = _of_folder(Path(source), ids)
        return [place for place in places if layers is None or _block(place.hook_name) in layers]
    found = []
    for sae_id, path in ids_of_release(str(source), ids, layers).items():
        hook_name = _hook_of_name(sae_id, f"{path} {source}")
        if hook_name is None:
            raise ConfigError(
                f"The name of the SAE {sae_id!r} of release {source!r} does not say where it belongs, which is known "
                "only when it is loaded. Select first (peft-sae select), and name the Subspace here."
            )
        found.append(ExpectedPlace(f"{source}/{sae_id}", hook_name, True))
    return found


def _hook_of_name(sae_id: str, about: str) -> str | None:
    """The hook point that the id of an SAE, and what else is known about it, tell of; None if they do not."""
    if named := _HOOK.search(sae_id):
        return re.sub(r"\d\.hook_z$", lambda end: end[0].replace(".", ".attn."), named[0])
    if _ELSEWHERE.search(sae_id):
        return None
    block = _BLOCK.search(sae_id) or _BLOCK.search(about)
    kind = next((kind for pattern, kind in _KINDS if pattern.search(f"{sae_id} {about}")), None)
    return None if block is None or kind is None else f"blocks.{block[1]}.{kind}"


def _of_folder(folder: Path, ids: Sequence[str] | None) -> list[ExpectedPlace]:
    single = (folder / _CONFIG_FILE).is_file()
    files = [folder / _CONFIG_FILE] if single else sorted(folder.glob(f"*/{_CONFIG_FILE}"))
    files = [path for path in files if ids is None or path.parent.name in ids]
    if not files:
        raise ArtifactError(f"'{folder}' holds no SAE{'' if ids is None else f' of {list(ids)}'}. Check the path.")
    found = []
    for path in files:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            metadata = {**data, **data.get("metadata", {})}
            hook_name = str(metadata.get("hook_name_out") or metadata["hook_name"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"'{path}' does not say where its SAE belongs ({error!r}). Save it again.") from error
        found.append(ExpectedPlace(path.parent.name, hook_name, False))
    return found


def _block(hook_name: str) -> int | None:
    found = re.match(r"blocks\.(\d+)\.", hook_name)
    return None if found is None else int(found[1])
