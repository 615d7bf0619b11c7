"""Finding the Subspace that an adapter is to be initialised from."""

from __future__ import annotations

import warnings
from pathlib import Path

from ..errors import ArtifactError, ConfigError, MissingSubspaceWarning
from ..subspace import Subspace
from .config import BESIDE, SaeSubspaceConfig


def resolve_subspace(config: SaeSubspaceConfig) -> Subspace | None:
    """Return the Subspace to initialise from, or None if the weights come from elsewhere.

    An adapter that is loaded to be run needs none. One that is loaded to be trained gets its weights from its
    file too, but may as well be a template for a new adapter, so its own Subspace is used if it is there.

    Raises:
        ArtifactError: the Subspace cannot be read.
        ConfigError: the configuration records another Subspace than it names.
    """
    record = config.basis_record
    if config.inference_mode and (record is not None or not isinstance(config.subspace, Subspace)):
        return None  # its weights follow; what its file names is not even looked at
    if record is not None and config.subspace is None and record["digest"] is None:
        return None
    if config.subspace is None:
        _warn_missing("No subspace is given")
        return None
    if record is not None and config.subspace == BESIDE and not Path(BESIDE).is_dir():
        _warn_missing("The adapter's own Subspace is not beside its configuration")
        return None
    subspace = _read(config)
    if subspace is None or record is None or record["digest"] in (None, subspace.digest):
        return subspace
    if config.subspace == BESIDE:  # a folder of that name that belongs to something else
        _warn_missing("The adapter's own Subspace is not beside its configuration")
        return None
    raise ConfigError(
        f"The configuration belongs to an adapter built from the Subspace {record['digest'][:12]}..., and the given "
        f"one is {subspace.digest[:12]}.... To start a new adapter from it, set basis_record=None."
    )


def _read(config: SaeSubspaceConfig) -> Subspace | None:
    if config.subspace is None or isinstance(config.subspace, Subspace):
        return config.subspace
    try:
        return Subspace.from_pretrained(config.subspace)
    except ArtifactError:
        if config.basis_record is None:
            raise
        _warn_missing(f"The adapter's Subspace is no longer at {str(config.subspace)!r}")
        return None


def _warn_missing(reason: str) -> None:
    warnings.warn(
        f"{reason}, so the adapter starts as plain LoRA, without a basis of features. If its weights are loaded "
        "afterwards, all is well; otherwise set `subspace` to a Subspace or its folder.",
        MissingSubspaceWarning,
        stacklevel=3,
    )
