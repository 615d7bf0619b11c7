"""Where a Subspace's files are."""

from __future__ import annotations

from pathlib import Path

from ..artifact import looks_like_path
from ..errors import ArtifactError
from ..reading import check_inside

JSON_FILE = "subspace.json"
TENSOR_FILE = "subspace.safetensors"


def find_folder(path_or_id: str | Path) -> Path:
    """Return the folder with a Subspace's files, from the Hub if there is none here.

    Args:
        path_or_id: such a folder, an adapter's folder, or the id of a Hub repository of either kind.

    Raises:
        ArtifactError: it is not there.
    """
    path = Path(path_or_id)
    try:
        for folder in (path, path / "subspace"):
            if (folder / JSON_FILE).is_file():
                for name in (JSON_FILE, TENSOR_FILE):
                    check_inside(folder / name, path)
                return folder
    except ArtifactError:
        raise
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{str(path)[:80]!r} is no path to a Subspace ({error}). Check it.") from error
    if path.exists():
        raise ArtifactError(
            f"'{path}' has no {JSON_FILE}, so it is no Subspace and no adapter with one. Give the folder that "
            "`Subspace.save_pretrained` or an adapter's `save_pretrained` wrote."
        )
    if looks_like_path(str(path_or_id)):
        raise ArtifactError(
            f"There is no folder '{path}' (the working directory is '{Path.cwd()}'), so there is no Subspace to read. "
            "Check the path. The Subspace of a saved adapter or configuration lies beside it, and is found by "
            "SaeSubspaceConfig.from_pretrained."
        )
    return _download(str(path_or_id))


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = Path(
            snapshot_download(
                repository, allow_patterns=[JSON_FILE, TENSOR_FILE, f"subspace/{JSON_FILE}", f"subspace/{TENSOR_FILE}"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"Subspace {repository!r} is no folder here, and cannot be had from the Hub "
            f"({type(error).__name__}). Check the path or the repository's name, and the network."
        ) from error
    for folder in (snapshot, snapshot / "subspace"):
        if (folder / JSON_FILE).is_file():
            return folder
    raise ArtifactError(f"The Hub repository {repository!r} has no {JSON_FILE}, so it holds no Subspace.")
