"""Checkpoints of base models, read tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .artifact import looks_like_path
from .errors import ArtifactError, ConfigError
from .reading import check_inside, parse_json, read_text

CONFIG_NAME = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MOST_BLOCKS = 10_000


def open_base(base: str | Path) -> tuple[Any, Any]:
    """Return the configuration of a base model, and the class that wrote the checkpoint.

    So a classifier keeps its head; where the class is unknown it is that of a causal language model.

    Args:
        base: folder or Hub id.

    Raises:
        ArtifactError: it cannot be read, or names code to run.
    """
    import transformers

    if looks_like_path(str(base)) and not Path(base).expanduser().is_dir():
        raise ArtifactError(
            f"The base model '{base}' cannot be loaded: there is no such folder (the working directory is "
            f"'{Path.cwd()}'). Check the path; ids of the Hub have the form OWNER/NAME."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        name = str((config.architectures or [""])[0])
        attention = [getattr(config, key, None) for key in ("_attn_implementation", "_experts_implementation")]
    except Exception as error:  # whatever transformers makes of a file that may hold anything
        if "trust_remote_code" in str(error):
            raise ArtifactError(
                f"The base model '{base}' brings code of its own, and no code is run for a file's sake. Load it "
                "yourself with transformers, put the adapter on with PeftModel.from_pretrained, and call "
                "merge_and_unload."
            ) from error
        raise ArtifactError(f"The base model '{base}' cannot be loaded ({error}). Check the path or the id.") from error
    for wanted in attention:
        if isinstance(wanted, str) and not wanted.isidentifier():
            raise ArtifactError(
                f"The configuration of '{base}' names {wanted!r} as its implementation, which is code from elsewhere, "
                "and no code is fetched or run for a file's sake. Remove it from config.json."
            )
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return config, found
    return config, transformers.AutoModelForCausalLM


_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICENSE*", "NOTICE*"]


def base_folder(source: str | Path, *, what: str = "base model") -> Path:
    """Return the folder of a base model or of an adapter; one of the Hub is fetched into the local cache.

    Args:
        source: folder or Hub id.
        what: how errors call it.

    Raises:
        ArtifactError: it is no folder, and the Hub has none of that name or cannot be reached.
    """
    if Path(source).is_dir() or looks_like_path(str(source)):
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=_PATTERNS))
    except Exception as error:  # of the network, of the Hub, of the cache
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArtifactError(
            f"There is no folder '{source}', and as a name on the Hub it brings no {what} ({reason}). Check the path "
            "or the id."
        ) from error


def build_skeleton(base: str | Path) -> Any:
    """Build the model of a checkpoint on the meta device, where its tensors have shapes and take no memory.

    Args:
        base: folder or Hub id.

    Raises:
        ArtifactError: its configuration cannot be read, or makes no model.
    """
    import torch

    try:
        config, kind = open_base(base)
        depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if isinstance(depth, int) and depth > _MOST_BLOCKS:
            raise ArtifactError(f"its configuration has {depth} blocks")
        # A class that only picks others has another name for the same.
        build = getattr(kind, "_from_config", None) or kind.from_config
        with torch.device("meta"):
            return build(config, attn_implementation="eager")
    except Exception as error:  # whatever a model makes of sizes from a file
        raise ArtifactError(
            f"The base model '{base}' cannot be opened ({error}), so it is not known what its modules are. Give it "
            "with model=... (on the command line --base), loaded or as its folder."
        ) from error


def load_base(base: str | Path, *, dtype: Any = "auto") -> Any:
    """Load a base model from its checkpoint in safetensors.

    Args:
        base: folder or Hub id.
        dtype: of the weights; `"auto"` takes them as they are.

    Raises:
        ArtifactError: it cannot be loaded, or its index names files outside its folder.
    """
    config, kind = open_base(base)
    if Path(base).is_dir():
        tensor_files(base)  # for its checks
    try:
        return kind.from_pretrained(base, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    except Exception as error:
        raise ArtifactError(f"The base model '{base}' cannot be loaded ({error}). Check the path or the id.") from error


def tensor_files(base: str | Path) -> dict[str, Path]:
    """Return the file of every tensor of a checkpoint.

    Args:
        base: folder, or Hub id whose files are in the local cache.

    Raises:
        ArtifactError: it has no weights in safetensors, or some of its files are missing, damaged, or links elsewhere.
    """
    from safetensors import SafetensorError, safe_open

    index = _find(base, _INDEX)
    try:
        if index is not None:
            entries = parse_json(read_text(index))["weight_map"]
            names = {str(file) for file in entries.values()}
            if any(Path(name).name != name for name in names):
                raise ArtifactError(f"'{index}' names files outside its folder. Get the checkpoint again.")
            places = {name: _find(base, name) for name in names}
            if None in places.values():
                gone = sorted(name for name, place in places.items() if place is None)
                raise ArtifactError(f"'{base}' lacks {gone[0]!r}, which its index names. Get the checkpoint again.")
            return {str(key): places[file] for key, file in entries.items()}  # type: ignore[misc]
        single = _find(base, _SINGLE)
        if single is not None:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"The weights of '{base}' cannot be read ({error}). Get the checkpoint again.") from error
    raise ArtifactError(
        f"'{base}' has neither {_SINGLE} nor {_INDEX} at hand, so its norms cannot be read. Give the loaded model with "
        "model=..., or the folder of its checkpoint."
    )


def _find(base: str | Path, name: str) -> Path | None:
    folder = Path(base)
    if folder.is_dir():
        if not (folder / name).is_file():
            return None
        check_inside(folder / name, folder)
        return folder / name
    from transformers.utils import cached_file

    try:
        found = cached_file(
            str(base), name, local_files_only=name != _INDEX, _raise_exceptions_for_missing_entries=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The base model '{base}' is no folder, and its files are not in the cache ({error}). Give the loaded "
            "model or its folder with model=..."
        ) from error
    return None if found is None else Path(found)
