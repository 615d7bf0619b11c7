"""Looking into an adapter: what it has learned, in the words of features."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn

from ..artifact import package_versions
from ..checkpoint import load_base
from ..errors import ConfigError
from ..sae.handle import SaeHandle, as_handles, check_distinct
from ..sae.identity import SaeIdentity
from ..sae.names import feature_name
from ..statistics.checks import context_length, prepends_bos
from ..statistics.data import ExampleReader, TokenChoice
from ..statistics.records import Data, check_data
from ..subspace import Subspace
from .activations import AFTER, activation_table, compare_activations, with_tokens
from .adapted import with_adapter
from .base import open_skeleton
from .feature_tables import feature_table, module_feature_table
from .features import read_features
from .groups import feature_groups
from .language import measure_language
from .modules import module_table
from .places import find_places, layout_of, norms_digest
from .result import Inspection
from .source import AdapterSource, source_of_folder, source_of_model

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PROTECTED = 1e-6  # share of a module's energy along a protected direction that rounding to bfloat16 may leave


def inspect_adapter(
    adapter: str | Path | PeftModel,
    model: PreTrainedModel | PeftModel | str | Path | None = None,
    data: Data | None = None,
    saes: Sequence[SaeHandle] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    labels: Mapping[str, str] | None = None,
    others: int = 16,
    tokens: TokenChoice = "all",
    top_examples: int = 3,
    batch_size: int = 8,
    max_length: int | None = None,
    adapter_name: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Inspection:
    """Measure what an adapter has learned: per module, per feature, and on texts.

    Without data nothing is run, and only the norms of the base model are read, so it takes seconds and little memory
    whatever the model's size. No matrix of a module's size is ever formed.

    Args:
        adapter: folder of an adapter (ours or a plain LoRA), or a `PeftModel` that holds one, for example in training.
        model: the base model, loaded, or its folder or Hub id; by default the one that the adapter names. With `data`
            it is loaded and run; a loaded one is left as it was found.
        data: texts, in the forms that `collect_statistics` takes: the adapter's effect on the next-token loss and, with
            `saes`, on every feature's activation is measured on them.
        saes: SAEs, from `load_saes`. A plain LoRA has features only by them. With an adapter of ours they make all
            features visible, not only those of its Subspace.
        tokenizer: the model's tokenizer; by default that beside the base model.
        labels: name to label, from `peft_sae.selection.labels.read_labels`.
        others: features per hook point and side to list beside those of the Subspace: those with the largest shares,
            and, on texts, those that were strengthened and weakened most.
        tokens: tokens of the texts that count.
        top_examples: texts per feature to show; 0 for none.
        batch_size: texts per forward pass.
        max_length: tokens per text; longer ones are cut.
        adapter_name: which adapter of a `PeftModel`; by default the active one.
        seed: for the random spaces that serve as controls.
        progress: show progress bars.

    Returns:
        Tables and numbers; `Inspection.save` writes them as JSON or as an HTML report.

    Raises:
        ArtifactError: the adapter or the base model is missing, incomplete or damaged.
        MismatchError: the adapter is of another model, or an SAE is not the one that it was built from.
        ConfigError: an argument is out of range, or something is missing that others need.
        DataError: the data are empty or malformed.
    """
    if others < 0 or top_examples < 0 or batch_size < 1:
        raise ConfigError(
            f"others={others} and top_examples={top_examples} must be 0 or more, and batch_size={batch_size} 1 or more."
        )
    handles = [] if saes is None else as_handles(saes)
    if handles:
        check_distinct(handles)
    if data is not None:
        data = list(data) if isinstance(data, Iterator) else data  # it is read more than once
        check_data(data, "inspected")
    source, base = _open(adapter, model, adapter_name, run=data is not None)
    groups = feature_groups(source.subspace, handles)
    layout, depth = layout_of(source, base) if groups else (None, 0)
    places = find_places(source, base, layout, depth, [group.sae for group in groups])
    readings = list(read_features(groups, places))
    notes = _notes(source, groups=bool(groups))
    # pandas has no strings with lone surrogates.
    names = {name: label.encode("utf-8", "replace").decode() for name, label in (labels or {}).items()}
    features = feature_table(readings, others=others, labels=names)
    notes += _protection_notes(features)
    activations = positions = None
    found: dict[str, Any] = {}
    provenance = _provenance(source, base, handles)
    provenance["norms_digest"] = norms_digest(places)
    named, used = provenance["base_model"], provenance["base_used"]
    if named and used and Path(named).name != Path(used).name:
        notes.append(
            f"The adapter names the base model '{named}', and '{used}' was used: if its norms are others, so are the "
            "numbers of features and drift."
        )
    if data is not None:
        if tokenizer is None:
            tokenizer = _tokenizer(base, source)
        in_memory = isinstance(adapter, PeftModel)
        with with_adapter(adapter if in_memory else base, None if in_memory else adapter, source.name) as adapted:
            limit = context_length(adapted.model, max_length)
            bos = prepends_bos(handles)  # as the SAEs were trained; without any, as the tokenizer does by itself
            reader = ExampleReader(tokenizer, tokens=tokens, max_length=limit, prepend_bos=bos)
            language = measure_language(
                adapted, data, reader, batch_size=batch_size, pad_id=tokenizer.pad_token_id or 0, progress=progress
            )
            found, positions = language.summary(), language.table()
            provenance["texts"] = {"tokens": tokens, "max_length": limit, "prepend_bos": bos}
            if handles:
                options: dict[str, Any] = {"tokens": tokens, "batch_size": batch_size, "max_length": max_length}
                before, after = compare_activations(
                    adapted, tokenizer, data, handles, top_examples=top_examples, progress=progress, **options
                )
                features = with_tokens(features, handles, adapted, tokenizer)
                activations = activation_table(
                    before,
                    after,
                    groups,
                    handles,
                    adapted,
                    tokenizer,
                    data,
                    others=others,
                    labels=names,
                    examples=top_examples > 0,
                )
                provenance["data"] = {
                    key: after.settings[key].get(AFTER) if isinstance(after.settings[key], Mapping) else None
                    for key in ("data", "examples", "truncated")
                }
            else:
                notes.append("No SAEs were given, so activations of features on the texts are not measured.")
    modules = module_table(places, seed=seed)
    return Inspection(
        summary={**_summary(source, modules), **found},
        provenance=provenance,
        modules=modules,
        features=features,
        module_features=module_feature_table(readings),
        coefficients=_coefficients(source),
        activations=activations,
        positions=positions,
        training=source.trainer_state,
        notes=tuple(notes),
    )


def _open(
    adapter: str | Path | PeftModel, model: Any, adapter_name: str | None, *, run: bool
) -> tuple[AdapterSource, nn.Module]:
    """The adapter and its base model, which is loaded only if it is to be run."""
    if isinstance(adapter, PeftModel):
        if model is not None and model is not adapter:
            raise ConfigError("The adapter is given in a PeftModel, which has its base model. Leave model=... out.")
        return source_of_model(adapter, adapter_name), adapter.get_base_model()
    if isinstance(model, PeftModel):
        raise ConfigError(
            f"model is a PeftModel, and the adapter is in '{adapter}'. Give the PeftModel as the adapter if that is "
            "the one to look into, or the base model."
        )
    if isinstance(adapter, nn.Module):
        raise ConfigError(
            f"The adapter is given as a {type(adapter).__name__}, and a folder or a PeftModel is needed. Save it with "
            "save_pretrained, or make the model with get_peft_model or PeftModel.from_pretrained."
        )
    source = source_of_folder(adapter)
    name = source.config.base_model_name_or_path if model is None else model
    if isinstance(name, nn.Module):
        return source, name
    if not name:
        raise ConfigError(
            f"The adapter in '{adapter}' does not name its base model. Give it with model=..., loaded or as its folder."
        )
    return source, load_base(name) if run else open_skeleton(name)


def _tokenizer(base: Any, source: AdapterSource) -> Any:
    import transformers

    name = getattr(base.config, "name_or_path", "") or source.config.base_model_name_or_path  # that which is run
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"There is no tokenizer beside '{name}' ({error}). Give it with tokenizer=...") from error


def _notes(source: AdapterSource, *, groups: bool) -> list[str]:
    notes = []
    if source.edits:
        names = [str(one.get("name")) for edit in source.edits for one in edit["features"]]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        notes.append(
            f"The adapter was edited after training ({', '.join(names[:5])}{more}), so drift and angles are those of "
            "training and edits together."
        )
        if source.edits[-1]["digest"] != source.digest:
            notes.append("Its weights were changed after its last recorded edit.")
    reasons: dict[str, list[str]] = {}
    for name, reason in source.left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notes.append(f"Not measured: {names[0]}{more}: {reason}.")
    if source.subspace is None:
        notes.append(
            "The adapter has no Subspace, so there is no basis that it could have moved away from."
            + ("" if groups else " Give SAEs to see which features it reads and writes.")
        )
    return notes


def _protection_notes(features: pd.DataFrame) -> list[str]:
    guarded = features[(features["group"] == "protected") & (features["top_share"].astype(float) > _PROTECTED)]
    if not len(guarded):
        return []
    worst = guarded.sort_values("top_share", ascending=False).iloc[0]
    return [
        f"The update uses {guarded['name'].nunique()} protected features, most of all {worst['name']} in "
        f"{worst['top_module']} ({worst['top_share']:.2g} of its energy): the weights, or the base model's norms, were "
        "changed after training."
    ]


def _provenance(source: AdapterSource, base: Any, handles: Sequence[SaeHandle]) -> dict[str, Any]:
    subspace, config = source.subspace, source.config
    found: dict[str, Any] = {
        "adapter": source.name,
        "adapter_digest": source.digest,
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
        "base_model": config.base_model_name_or_path or getattr(getattr(base, "config", None), "name_or_path", None),
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "base_used": str(getattr(getattr(base, "config", None), "name_or_path", "") or ""),
        "edits": [
            {"features": edit["features"], "kind": edit.get("kind"), "parent_digest": edit.get("parent_digest")}
            for edit in source.edits
        ],
        "versions": package_versions(),
    }
    if subspace is not None:
        found["subspace"] = {
            "digest": subspace.digest,
            "model": dict(subspace.model),
            "settings": dict(subspace.settings),
            "versions": dict(subspace.versions),
            "freeze_basis": config.freeze_basis,
            "norm_gain": config.norm_gain,
            "layer_map": config.layer_map,
            "saes": [sae.to_dict() for sae in _saes_of(subspace)],
        }
    if handles:
        found["saes"] = [handle.identity.to_dict() for handle in handles]
    return found


def _saes_of(subspace: Subspace) -> list[SaeIdentity]:
    return [*(site.sae for site in subspace.sites), *(site.sae for site in subspace.protected)]


def _summary(source: AdapterSource, modules: pd.DataFrame) -> dict[str, Any]:
    energy = modules["norm"].astype(float) ** 2
    known = modules["in_basis"].notna()
    weight = energy[known].sum()

    def mean(column: str) -> float | None:
        return float((modules.loc[known, column].astype(float) * energy[known]).sum() / weight) if weight else None

    inside = mean("in_basis")
    angles = modules["largest_angle"].dropna().astype(float)
    return {
        "modules": len(modules),
        "parameters": sum(update.a.numel() + update.b.numel() for update in source.updates),
        "norm": float(energy.sum() ** 0.5),
        "in_basis": inside,
        "drift": None if inside is None else 1 - inside,
        "in_random": mean("in_random"),
        "chance": mean("chance"),
        "largest_angle": float(angles.max()) if len(angles) else None,
    }


def _coefficients(source: AdapterSource) -> pd.DataFrame:
    import pandas as pd

    sites = [] if source.subspace is None else list(source.subspace.sites)
    rows = [
        (site.sae.hook_name, vector, feature_name(site.sae, feature), float(site.coefficients[vector, place]))
        for site in sites
        for vector in range(site.rank)
        for place, feature in enumerate(site.features.tolist())
    ]
    return pd.DataFrame(rows, columns=["hook_name", "vector", "name", "coefficient"])
