"""Removing, scaling or keeping features in a trained adapter, without training again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..adapter import EDIT_FILE, EDIT_SCHEMA, EDIT_SCHEMA_VERSION, WEIGHTS_FILE, read_adapter_weights, read_edits
from ..artifact import digest, package_versions, write_json
from ..errors import ArtifactError, ConfigError, MismatchError
from ..inspect.base import open_skeleton
from ..inspect.groups import feature_groups
from ..inspect.places import layout_of
from ..inspect.source import AdapterSource, source_of_folder
from ..sae.handle import SaeHandle, as_handles, check_distinct
from ..sae.placement import check_placement
from ..tuner import SaeSubspaceConfig
from ..tuner.card import amend_card
from ..tuner.card_section import put_section
from ..tuner.sites import width_of
from ..writing import check_target, check_writable, replace_folder
from .directions import find_maps
from .folder import check_apart, copy_beside
from .record import edits_section
from .request import EditedFeature, Kind, Scales, find_features, read_wish
from .weights import EXACT, ModuleEdit, check_editable, edit_weights, read_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_LARGE = 10  # factors beyond are told


def edit_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    remove: Sequence[str] = (),
    scale: Scales | None = None,
    keep: Sequence[str] | None = None,
    model: PreTrainedModel | str | Path | None = None,
    saes: Sequence[SaeHandle] | None = None,
) -> Path:
    """Write an adapter in which named features are removed, scaled, or the only ones kept. Nothing is trained.

    What is edited is how every module's update dW = s B A meets a feature. With v_i the vector along which the module
    meets feature i (its decoder direction, carried through the norm between the residual stream and the module), a
    reading module reads the feature as dW v_i, and a writing one writes v_i^T dW along it. Afterwards these are

    - of removed features 0: A becomes A (I - Q^T Q), or B (I - Q^T Q) B, Q [n, width] an orthonormal basis of the v_i;
    - of scaled ones c_i times what they were, exactly, however they overlap: A becomes A (I - V^T diag(1 - c) U), with
      U the dual vectors (u_i . v_j is 1 for i = j and else 0) in the span of the v_i, the pseudo-inverse of V. So what
      is orthogonal to all edited features stays as it is, and so does each feature that is named with c = 1. A feature
      that is not named changes by as much as its direction lies in that span;
    - if features are kept, all of what is orthogonal to their span is removed, of features or not: A becomes A Q^T Q.

    As with `protect`, it holds for *every* module of the adapter: a feature of the residual stream, from whichever hook
    point, for all modules that read or write the stream, near or far; one of the heads' output (`hook_z`) or of the
    MLP's input for the modules of its own block that read there. Modules that meet none of the kept features lose their
    update. Protected features stay protected: where an edited direction overlaps them, its part across them is edited.

    As with `protect`, too, this is about the update's factors, not about the model. What a reading module (q, v, gate)
    still computes from other directions goes on through weights of the base, which may write the feature: with no
    writing module (o, down) adapted the stream can differ from the base's along a removed feature as much as before.
    And a feature is its decoder direction: its activation can still move by what the update writes across it, and
    later blocks may bring it about.

    The edited adapter is loaded like any other; no basis is written over its factors. Training it on with a trainable
    basis may bring features back; with `freeze_basis` the frozen factor, and so what was edited of it, stays, and is no
    longer exactly the Subspace's basis. There is no inverse: the original stays, and `edit.json` records what was done
    to which parent.

    Args:
        adapter: folder of an adapter, ours or a plain LoRA. It is never changed.
        output: folder to write, missing or empty. All files of the original come along, except checkpoints, optimiser
            state, other adapters in sub-folders, and links out of the folder.
        remove: names of features, `"blocks.12.hook_resid_post:4051"` or `"12:4051"`.
        scale: name to the number that the feature is to be multiplied by; pairs serve too.
        keep: names of the features to keep; not together with the others.
        model: the base model, loaded, or its folder or Hub id; by default the one that the adapter names. Only its
            norms are read.
        saes: SAEs, from `load_saes`: for a plain LoRA, or for features that are not in the adapter's Subspace.

    Returns:
        The output folder.

    Raises:
        ArtifactError: adapter or base model are missing, incomplete or damaged, or the output exists, is the adapter or
            lies in it, or cannot be written.
        SelectionError: a name means no feature whose direction is known.
        ConfigError: there is nothing to do, wishes contradict each other, or a module could use the features in a way
            that cannot be edited (embeddings, DoRA, biases, modules whose place is not known).
        MismatchError: the adapter or the SAEs are of another model, or an SAE is not the one that the adapter was built
            from.
    """
    wish = read_wish(remove, scale, keep)
    folder, output = Path(adapter), Path(output)
    check_apart(folder, output)
    check_target(output)
    handles = [] if saes is None else as_handles(saes)
    if handles:
        check_distinct(handles)
    source, weights = _read(folder)
    earlier = read_edits(folder)
    notes = [*_notes(earlier, source), *_notes_of_factors(wish.factors), *check_editable(source, weights, wish.kind)]
    features = find_features(wish, feature_groups(source.subspace, handles))
    check_writable(output)
    base = _open_base(source, model)
    if handles:
        check_placement(base, handles)
    layout, depth = layout_of(source, base)
    maps = find_maps(source, base, layout, depth, wish.kind, features)
    edited, modules = edit_weights(source, weights, maps)
    notes += _tell(modules)
    for note in notes:
        logger.warning("%s", note)
    edit = _describe(wish.kind, features, source, base, digest(edited), modules, notes)
    with replace_folder(output) as target:
        edit["left_out"] = copy_beside(folder, target)
        _write(target, edited, read_metadata(folder / WEIGHTS_FILE))
        edits = [*earlier, edit]
        write_json(target / EDIT_FILE, {"schema": EDIT_SCHEMA, "schema_version": EDIT_SCHEMA_VERSION, "edits": edits})
        _tell_in_card(target / "README.md", edits)
    return output


def _tell_in_card(card: Path, edits: Sequence[Mapping[str, Any]]) -> None:
    """The card of a copy must not pass for that of the original; but a card fails no edit."""
    try:
        amend_card(card, lambda body: put_section(body, edits_section(edits), "edits"))
    except (OSError, UnicodeError) as error:
        logger.warning("The model card does not say that the adapter was edited (%s).", error)


def _read(folder: Path) -> tuple[AdapterSource, dict[str, torch.Tensor]]:
    source = source_of_folder(folder)
    weights = read_adapter_weights(folder)
    if not source.updates:
        raise ConfigError(f"The adapter in '{folder}' has no low-rank update, so there is nothing to edit.")
    return source, weights


def _open_base(source: AdapterSource, model: Any) -> Any:
    if isinstance(model, PeftModel):
        raise ConfigError("model is a PeftModel, and the base model is needed. Give model=peft_model.get_base_model().")
    name = source.config.base_model_name_or_path if model is None else model
    if not isinstance(name, nn.Module) and not name:
        raise ConfigError(
            f"The adapter in '{source.name}' does not name its base model, whose norms say how its modules meet "
            "features. Give it with model=... (on the command line --base), loaded or as its folder."
        )
    base = name if isinstance(name, nn.Module) else open_skeleton(name)
    if not isinstance(source.config, SaeSubspaceConfig):
        _check_targets(source, base)
    return base


def _check_targets(source: AdapterSource, base: nn.Module) -> None:
    """A plain LoRA says of its base only which modules it adapts; another model may have more of them."""
    known = {update.name for update in source.updates}
    for name, module in base.named_modules():
        if name and name not in known and width_of(module, "read") and check_target_module_exists(source.config, name):
            raise MismatchError(
                f"The adapter in '{source.name}' is to adapt {name!r}, which the model ({type(base).__name__}) has and "
                "the adapter has no factors for: it is an adapter of another model. Give the base that it was trained "
                "on."
            )


def _notes(earlier: Sequence[dict[str, Any]], source: AdapterSource) -> list[str]:
    if earlier and earlier[-1]["digest"] != source.digest:
        return ["The adapter's weights were changed after its last recorded edit, so that edit may no longer hold."]
    return []


def _notes_of_factors(factors: Sequence[tuple[str, float]]) -> list[str]:
    large = [f"{name} by {factor:g}" for name, factor in factors if abs(factor) > _LARGE]
    if not large:
        return []
    return [f"Scaling {', '.join(large[:3])} makes the update much larger than training ever had it."]


def _tell(modules: dict[str, ModuleEdit]) -> list[str]:
    notes = []
    empty = [name for name, module in modules.items() if module.norm_before and not module.norm_after]
    if empty:
        notes.append(f"Nothing is left of the updates of {len(empty)} of {len(modules)} modules ({empty[0]} ...).")
    if not any(module.changed and module.changed > EXACT for module in modules.values()):
        notes.append("Nothing changed: the update did not use these features (or the factor is 1).")
    worst = max(modules, key=lambda name: modules[name].left)
    if modules[worst].left > EXACT:
        notes.append(
            f"Rounding to the adapter's dtype leaves up to {modules[worst].left:.1e} of an update along the edited "
            f"features ({worst})."
        )
    return notes


def _describe(
    kind: Kind,
    features: Sequence[EditedFeature],
    source: AdapterSource,
    base: Any,
    new_digest: str,
    modules: dict[str, ModuleEdit],
    notes: list[str],
) -> dict[str, Any]:
    saes = {feature.sae.hook_name: feature.sae for feature in features}
    name = source.config.base_model_name_or_path or getattr(getattr(base, "config", None), "name_or_path", None)
    return {
        "kind": kind,
        "features": [
            {"name": one.name, "sae": one.sae.name, "sae_digest": one.sae.digest, "factor": one.factor}
            for one in features
        ],
        "saes": [sae.to_dict() for sae in saes.values()],
        "parent": Path(source.name).name,
        "parent_digest": source.digest,
        "digest": new_digest,
        "subspace_digest": None if source.subspace is None else source.subspace.digest,
        "base_model": name or None,
        "versions": package_versions(),
        "modules": {module: asdict(report) for module, report in modules.items()},
        "notes": notes,
    }


def _write(target: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, target / WEIGHTS_FILE, metadata=metadata)
    except SafetensorError as error:
        raise ArtifactError(f"The edited weights cannot be written ({error}). Check the space there.") from error
