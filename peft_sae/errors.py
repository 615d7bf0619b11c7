"""The exceptions and warnings of this package.

Every message says the value that was found, what follows from it, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str]) -> str:
    """Return a sentence that names the known word most like a mistyped one, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class PeftSaeError(Exception):
    """Base class of everything that this package raises on purpose."""


class ConfigError(PeftSaeError, ValueError):
    """A configuration value or a combination of values cannot work."""


class DataError(PeftSaeError, ValueError):
    """A data set, or the activations computed from it, cannot be used."""


class MismatchError(PeftSaeError, ValueError):
    """Two parts that must belong together (model, SAE, statistics, Subspace) do not."""


class SelectionError(PeftSaeError, ValueError):
    """A selector is unknown, misused, or finds too few features."""


class ArtifactError(PeftSaeError, OSError, ValueError):
    """A file or folder is missing, damaged, or of an unknown format."""


class UnsupportedPeftError(PeftSaeError, ImportError):
    """The installed PEFT lacks something that the tuner is built on."""


class MissingSubspaceWarning(UserWarning):
    """An adapter starts as plain LoRA because no Subspace is at hand."""
