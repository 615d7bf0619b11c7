"""Loading of SAEs. sae-lens reads the weights; this module checks that they can be used here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..artifact import digest, looks_like_path
from ..errors import ArtifactError, ConfigError, MismatchError
from ..layout import Site
from .identity import SaeIdentity

if TYPE_CHECKING:
    from sae_lens import SAE

_SAE_CONFIG_FILE = "cfg.json"
_UNFOLDED = ("expected_average_only_in", "covariance_whitening")
# These give a token features that depend on the other tokens beside it.
_JOINT_ARCHITECTURES = ("temporal", "batchtopk", "matryoshka_batchtopk")


@dataclass(frozen=True)
class SaeHandle:
    """An SAE with what is needed to run it on a plain Hugging Face model.

    Attributes:
        identity: which SAE it is.
        sae: the sae-lens object.
        center_input: whether the mean over `d_model` must be taken off its input, because it was
            trained on a TransformerLens model whose writing weights are centred.
        prepend_bos: whether it was trained on texts that begin with BOS; None if unknown.
    """

    identity: SaeIdentity
    sae: SAE[Any]
    center_input: bool
    prepend_bos: bool | None

    @torch.no_grad()
    def encode(self, activations: torch.Tensor) -> torch.Tensor:
        """Return the feature activations of `activations` as sae-lens computes them.

        Args:
            activations: shape [tokens, d_in], any floating dtype and device.

        Returns:
            Shape [tokens, d_sae], in the SAE's dtype and on its device.
        """
        activations = activations.to(device=self.sae.device, dtype=self.sae.dtype)
        if self.center_input:
            activations = activations - activations.mean(dim=-1, keepdim=True)
        with _unchanged(self.sae):
            if self.sae.hook_z_reshaping_mode:
                # A plain model gives the heads' outputs already side by side, as this SAE wants them inside.
                self.sae.turn_off_forward_pass_hook_z_reshaping()
            features: torch.Tensor = self.sae.encode(activations)
        return features.to_dense() if features.is_sparse else features

    @property
    def decoder(self) -> torch.Tensor:
        """Decoder directions, shape [d_sae, d_in], one row per feature, of any length."""
        decoder: torch.Tensor = self.sae.W_dec
        return decoder.detach()


@contextmanager
def _unchanged(sae: SAE[Any]) -> Iterator[None]:
    """Undo what encoding stores in the SAE object: its reshaping mode and the norms of the last input."""
    before = dict(vars(sae))
    try:
        yield
    finally:
        vars(sae).clear()
        vars(sae).update(before)


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


def make_handle(sae: SAE[Any], *, name: str | None = None, neuronpedia_id: str | None = None) -> SaeHandle:
    """Wrap one SAE object after checking that it can be used.

    Raises:
        MismatchError: no or unsupported hook point, a transcoder, an SAE that mixes tokens, an input
            scaling that was never folded in, or weights that are not finite.
        ConfigError: it is no SAE.
    """
    if not hasattr(sae, "W_dec"):
        raise ConfigError(
            f"A {type(sae).__name__} is given where an SAE is needed. Give sae-lens' SAE objects, or the name of a "
            "release or folder."
        )
    metadata = sae.cfg.metadata
    hook_name = metadata.hook_name_out or metadata.hook_name
    if not hook_name or not isinstance(hook_name, str):
        raise MismatchError(
            "The SAE's metadata name no hook point, so its directions have no place in the model. Set "
            "`sae.cfg.metadata.hook_name`, for example to 'blocks.12.hook_resid_post'."
        )
    architecture = sae.cfg.architecture()
    if "transcoder" in architecture or hook_name != (metadata.hook_name or hook_name):
        raise MismatchError(
            f"The SAE maps {metadata.hook_name!r} to {metadata.hook_name_out!r}: it is a transcoder, whose "
            "features are not yet supported. Use SAEs that rebuild their own input."
        )
    if architecture in _JOINT_ARCHITECTURES:
        raise MismatchError(
            f"The SAE at {hook_name} is of the architecture {architecture!r}, in which a token's features depend on "
            "the tokens beside it, so they cannot be summed up. Save a trained one for inference, or use another."
        )
    site = Site.from_hook_name(hook_name)
    if sae.cfg.normalize_activations in _UNFOLDED:
        raise MismatchError(
            f"The SAE's input scaling {sae.cfg.normalize_activations!r} is not folded into its weights, so its "
            "activations would be wrong. Call `sae.fold_activation_norm_scaling_factor(scale)` or "
            "`sae.fold_activation_whitening(...)` first."
        )
    weights = {"W_enc": sae.W_enc, "W_dec": sae.W_dec}
    for key, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise MismatchError(f"The SAE's {key} at {hook_name} holds NaN or infinity. Load it again.")
    identity = SaeIdentity.from_dict(
        SaeIdentity(
            name=name or metadata.neuronpedia_id or f"sae/{hook_name}",
            hook_name=hook_name,
            d_in=int(sae.cfg.d_in),
            d_sae=int(sae.cfg.d_sae),
            model_name=metadata.model_name,
            neuronpedia_id=neuronpedia_id or metadata.neuronpedia_id,
            digest=digest(weights),
        ).to_dict()
    )  # for its checks: the metadata come from a file
    model_kwargs = metadata.model_from_pretrained_kwargs or {}
    return SaeHandle(
        identity=identity,
        sae=sae,
        # Centring changes what is written to the residual stream, not what the heads put out.
        center_input=bool(model_kwargs.get("center_writing_weights", False)) and site.kind != "z",
        prepend_bos=metadata.prepend_bos,
    )


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
    handles = []
    for sae_id in chosen:
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


def as_handles(saes: Sequence[SaeHandle | SAE[Any]]) -> list[SaeHandle]:
    """Return handles, made of SAE objects where those are given.

    Raises:
        ConfigError: something else is given, such as the name of a release.
        MismatchError: as `make_handle`.
    """
    if isinstance(saes, (str, Path)):
        raise ConfigError(
            f"saes={str(saes)!r} names SAEs that are not loaded. Use saes=load_saes({str(saes)!r}, ids=[...])."
        )
    given = [saes] if isinstance(saes, (SaeHandle, torch.nn.Module)) else list(saes)
    return [entry if isinstance(entry, SaeHandle) else make_handle(entry) for entry in given]


def check_distinct(handles: Sequence[SaeHandle]) -> None:
    """Raise an error if there is no SAE, or if two have the same hook point.

    Raises:
        ConfigError: there is none.
        MismatchError: two have the same hook point.
    """
    if not handles:
        raise ConfigError("No SAE is given, so there is nothing to build a basis from. Give at least one.")
    seen: dict[str, str] = {}
    for handle in handles:
        identity = handle.identity
        if identity.hook_name in seen:
            raise MismatchError(
                f"The SAEs {seen[identity.hook_name]!r} and {identity.name!r} have the same hook point "
                f"{identity.hook_name}. Choose one of them."
            )
        seen[identity.hook_name] = identity.name


def _similar(name: str, known: Iterable[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, list(known), n=5, cutoff=0.3)


class _quiet(warnings.catch_warnings):
    """Silences sae-lens' advice to load the model its way: `center_input` does that here."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
