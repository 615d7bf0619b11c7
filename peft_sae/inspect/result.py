"""What an inspection has found."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..writing import check_suffix, write_text

if TYPE_CHECKING:
    import pandas as pd

_SCHEMA = "peft_sae.inspection"
_SCHEMA_VERSION = 1
SUFFIXES = (".html", ".json")
TABLES = ("modules", "features", "module_features", "coefficients", "activations", "positions")


@dataclass(frozen=True, eq=False)
class Inspection:
    """What an adapter has learned, as tables.

    Attributes:
        summary: numbers of the adapter as a whole.
        provenance: adapter, base model, Subspace, SAEs, data and package versions.
        modules: one row per module (`peft_sae.inspect.modules.COLUMNS` says what the columns are).
        features: one row per feature and side (`peft_sae.inspect.feature_tables.FEATURE_COLUMNS`).
        module_features: share of each chosen or protected feature in each module: `name`, `module`, `side`, `share`.
        coefficients: how the basis vectors consist of the chosen features: `hook_name`, `vector`, `name`,
            `coefficient`; a basis vector is the sum of its features' unit directions times the coefficients.
        activations: one row per feature on the given texts (`peft_sae.inspect.activations.ACTIVATION_COLUMNS`); None
            without data and SAEs.
        positions: next-token loss and divergence per token position (`peft_sae.inspect.language.POSITION_COLUMNS`);
            None without data.
        training: the log of the `Trainer` that saved the adapter, if it was there.
        notes: what could not be measured, and what the reader should know.
    """

    summary: Mapping[str, Any]
    provenance: Mapping[str, Any]
    modules: pd.DataFrame
    features: pd.DataFrame
    module_features: pd.DataFrame
    coefficients: pd.DataFrame
    activations: pd.DataFrame | None = None
    positions: pd.DataFrame | None = None
    training: Sequence[Mapping[str, Any]] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable data; a table is a list of rows, what is unknown is None."""
        tables = {
            name: None if getattr(self, name) is None else _plain(getattr(self, name).to_dict("records"))
            for name in TABLES
        }
        return {
            "schema": _SCHEMA,
            "schema_version": _SCHEMA_VERSION,
            "summary": _plain(self.summary),
            "provenance": _plain(self.provenance),
            **tables,
            "training": _plain(self.training),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the inspection, whole or not at all, in the format that the file's suffix says.

        Args:
            path: the file, with the suffix .html or .json. An earlier one is replaced.

        Raises:
            ConfigError: unknown suffix.
            ArtifactError: it cannot be written.
        """
        check_suffix(path, SUFFIXES)
        write_text(path, self.to_html() if Path(path).suffix.lower() == ".html" else self.to_json())

    def to_html(self) -> str:
        """Return a report as one HTML page that needs nothing beside it."""
        from .report import html_report

        return html_report(self)


def _plain(value: Any) -> Any:
    """Numbers, texts, lists and mappings only; what is not a number is None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):  # numpy's numbers
        return _plain(value.item())
    return None if str(value) in ("<NA>", "nan", "NaT") else str(value)
