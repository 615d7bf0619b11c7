"""An SAE that can be used here: what was checked, and how its activations are computed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..artifact import digest
from ..errors import ConfigError, MismatchError
from ..layout import LOCAL_KINDS, Site
from .encoding import encode, encode_blocks
from .identity import SaeIdentity

if TYPE_CHECKING:
    from sae_lens import SAE

_UNFOLDED = ("expected_average_only_in", "covariance_whitening")
# These give a token features that depend on the other tokens beside it.
_JOINT_ARCHITECTURES = ("temporal", "batchtopk", "matryoshka_batchtopk")
_HOOK_MLP_IN = re.compile(r"(blocks\.[0-9]{1,4})\.hook_mlp_in")


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

    def encode(self, activations: torch.Tensor) -> torch.Tensor:
        """Return the feature activations of `activations` as sae-lens computes them.

        Args:
            activations: what is at the identity's `site_in`, of any floating dtype and device; shape [tokens, width],
                where the width is the identity's `d_in` except for transcoders (`sae.cfg.d_in`).

        Returns:
            Shape [tokens, d_sae], in the SAE's dtype and on its device.
        """
        return encode(self.sae, self._prepared(activations))

    def encode_blocks(self, activations: torch.Tensor, elements: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Yield the feature activations block by block, for all features of many tokens in little memory.

        Args:
            activations: as for `encode`.
            elements: about how many feature activations a block has.

        Yields:
            Which tokens, which features, and their activations [tokens of the block, features of the block].
        """
        return encode_blocks(self.sae, self._prepared(activations), elements)

    @torch.no_grad()
    def _prepared(self, activations: torch.Tensor) -> torch.Tensor:
        activations = activations.to(device=self.sae.device)
        if self.center_input:  # before anything is rounded to the SAE's dtype
            activations = activations.to(torch.promote_types(activations.dtype, torch.float32))
            activations = activations - activations.mean(dim=-1, keepdim=True)
        return activations.to(dtype=self.sae.dtype)

    @property
    def decoder(self) -> torch.Tensor:
        """Decoder directions, shape [d_sae, d_in] (the identity's), one row per feature, of any length."""
        decoder: torch.Tensor = self.sae.W_dec
        return decoder.detach()


def make_handle(sae: SAE[Any], *, name: str | None = None, neuronpedia_id: str | None = None) -> SaeHandle:
    """Wrap one SAE object after checking that it can be used.

    Raises:
        MismatchError: no or unsupported hook point, a transcoder between blocks, an SAE that mixes tokens, an input
            scaling that was never folded in, or weights that are not finite.
        ConfigError: it is no SAE.
    """
    if not hasattr(sae, "W_dec"):
        raise ConfigError(
            f"A {type(sae).__name__} is given where an SAE is needed. Give sae-lens' SAE objects, or the name of a "
            "release or folder."
        )
    metadata = sae.cfg.metadata
    hook_name, hook_name_in = _hook_names(sae)
    _check_encoding(sae, hook_name)
    # Biases and thresholds decide which features fire just as well.
    weights = {name: weight.detach() for name, weight in sae.named_parameters()}
    for key, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise MismatchError(f"The SAE's {key} at {hook_name} holds NaN or infinity. Load it again.")
    identity = SaeIdentity.from_dict(
        SaeIdentity(
            name=name or metadata.neuronpedia_id or f"sae/{hook_name}",
            hook_name=hook_name,
            d_in=int(sae.W_dec.shape[1]),
            d_sae=int(sae.cfg.d_sae),
            model_name=metadata.model_name,
            neuronpedia_id=neuronpedia_id or metadata.neuronpedia_id,
            digest=digest(weights),
            hook_name_in=hook_name_in,
        ).to_dict()
    )  # for its checks: the metadata come from a file
    _check_sites(identity, metadata)
    return SaeHandle(
        identity=identity,
        sae=sae,
        # Centring changes what is written to the residual stream: not what the heads put out, nor what a norm that
        # takes the mean off by itself puts out.
        center_input=bool(_model_settings(metadata).get("center_writing_weights", False))
        and identity.site_in.kind not in (*LOCAL_KINDS, "mlp_normalized"),
        prepend_bos=metadata.prepend_bos,
    )


def _hook_names(sae: SAE[Any]) -> tuple[str, str | None]:
    """Where the decoder's directions live, and where the encoder reads if that is another place."""
    metadata = sae.cfg.metadata
    read, written = _place_read(metadata), metadata.hook_name_out
    if not read or not isinstance(read, str):
        raise MismatchError(
            "The SAE's metadata name no hook point, so its directions have no place in the model. Set "
            "`sae.cfg.metadata.hook_name`, for example to 'blocks.12.hook_resid_post'."
        )
    if not written and "transcoder" in sae.cfg.architecture():
        raise MismatchError(
            f"The transcoder reads {read} and does not say what it rebuilds, so its directions have no place in the "
            "model. Set `sae.cfg.metadata.hook_name_out`, for example to 'blocks.12.hook_mlp_out'."
        )
    return (read, None) if not written or written == metadata.hook_name else (written, read)


def _place_read(metadata: Any) -> Any:
    """The hook name of what the encoder reads, with the one name made clear that is used for two places.

    TransformerLens' `hook_mlp_in` is the stream before the MLP's norm. sae-lens calls the place of Gemma Scope 2's
    transcoders so as well, and keeps beside it the release's own name for it, which says that it is behind the norm.
    """
    name, own_name = metadata.hook_name, metadata.hf_hook_name
    match = _HOOK_MLP_IN.fullmatch(name) if isinstance(name, str) else None
    if match is None or own_name is None:
        return name
    if re.search(r"\.(pre_feedforward_layernorm\.output|mlp\.input)$", str(own_name)) is None:
        raise MismatchError(
            f"The SAE's metadata name its input {name!r} and {own_name!r}, and it is not known that these are one "
            "place. Set `sae.cfg.metadata.hook_name` to 'blocks.N.mlp.hook_in' if it is behind the MLP's norm, to "
            "'blocks.N.hook_resid_mid' if before it, and `hf_hook_name` to None."
        )
    return f"{match[1]}.mlp.hook_in"


def _check_encoding(sae: SAE[Any], hook_name: str) -> None:
    architecture = sae.cfg.architecture()
    if architecture in _JOINT_ARCHITECTURES:
        raise MismatchError(
            f"The SAE at {hook_name} is of the architecture {architecture!r}, in which a token's features depend on "
            "the tokens beside it, so they cannot be summed up. Save a trained one for inference, or use another."
        )
    if sae.cfg.normalize_activations in _UNFOLDED:
        raise MismatchError(
            f"The SAE's input scaling {sae.cfg.normalize_activations!r} is not folded into its weights, so its "
            "activations would be wrong. Call `sae.fold_activation_norm_scaling_factor(scale)` or "
            "`sae.fold_activation_whitening(...)` first."
        )
    if sae.W_dec.ndim != 2:
        raise MismatchError(
            f"The SAE's decoder at {hook_name} has the shape {tuple(sae.W_dec.shape)}, and one direction per feature "
            "is needed. Cross-layer transcoders are not supported: use SAEs or transcoders of single layers."
        )


def _check_sites(identity: SaeIdentity, metadata: Any) -> None:
    written, read = identity.site, identity.site_in
    if written.block != read.block:
        raise MismatchError(
            f"The SAE maps {identity.hook_name_in} to {identity.hook_name}, in another block: cross-layer transcoders "
            "are not supported. Use SAEs, or transcoders of single layers."
        )
    if _model_settings(metadata).get("fold_ln", False) and "mlp_in" in (written.kind, read.kind):
        raise MismatchError(
            f"The SAE at {identity.hook_name} was trained on a model whose norms' gains were folded into the MLP "
            "(fold_ln=True), so what it calls the MLP's input is not that of the plain model. If its encoder reads "
            f"there, set its hook name to 'blocks.{read.block}.ln2.hook_normalized', which is the same tensor."
        )


def _model_settings(metadata: Any) -> dict[str, Any]:
    """With which settings TransformerLens loaded the model that it was trained on."""
    return metadata.model_from_pretrained_kwargs or {}


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
    seen: dict[Site, str] = {}
    for handle in handles:
        identity = handle.identity
        if identity.site in seen:
            raise MismatchError(
                f"The SAEs {seen[identity.site]!r} and {identity.name!r} have the same hook point "
                f"{identity.hook_name}. Choose one of them."
            )
        seen[identity.site] = identity.name
