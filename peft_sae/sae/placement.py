"""Where an SAE's hook point and a block's modules are in a plain Hugging Face model.

TransformerLens' bridge knows, for more than a hundred architectures, which module of the Hugging Face
model each of its hook names stands for. Its adapters are asked here; no second table is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..errors import MismatchError
from ..layout import SITE_KINDS, BlockLayout, ModuleRole, Site
from .handle import SaeHandle
from .model_names import is_other_model
from .norm import can_leave_out_gain

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Tap:
    """One tensor of a running model.

    Attributes:
        module: name of the module in the model at hand.
        end: whether the tensor is the module's input, its output, or, of a norm, what it makes of its input before its
            gain and bias (see `without_gain`).
        site: the same place, as the SAE's metadata name it.
    """

    module: str
    end: Literal["input", "output", "normalized"]
    site: Site


def find_tap(model: PreTrainedModel, site: Site) -> Tap:
    """Return the tensor of `model` at a site.

    Raises:
        MismatchError: the architecture is unknown to TransformerLens, or the model has no such block
            or site.
    """
    bridge = _bridge_blocks(model)
    blocks = _blocks_path(model, bridge.name)
    count = len(model.get_submodule(blocks))
    if site.block >= count:
        raise MismatchError(
            f"Hook point {site.kind} of block {site.block} does not exist: {type(model).__name__} has {count} blocks "
            f"(0 to {count - 1}). Use SAEs that were trained on this model."
        )
    if _is_post_norm(bridge) and site.kind not in ("resid_pre", "resid_post", "z"):
        raise MismatchError(
            f"{type(model).__name__} has its norms behind the sums, so no tensor of it is what {site.kind} means "
            "elsewhere. Use SAEs at resid_pre, resid_post or z."
        )
    alias = _alias(bridge, site.kind)
    if alias is None:
        raise MismatchError(
            f"{type(model).__name__} has no hook point {site.kind}: its blocks are built without it. Use SAEs at "
            f"{[kind for kind in SITE_KINDS if _alias(bridge, kind) is not None]}."
        )
    *path, end = alias.split(".")
    module = ".".join([blocks, str(site.block), *_remote_path(bridge, path)])
    if site.kind == "mlp_normalized":
        _check_norm(model, module)
        return Tap(module=module, end="normalized", site=site)
    return Tap(module=module, end="input" if end == "hook_in" else "output", site=site)


def _alias(bridge: Any, kind: str) -> str | None:
    """The bridge's own name within a block for a kind of site; None if the blocks have none."""
    if kind == "z":
        return "attn.o.hook_in"
    if kind == "mlp_in":
        mlp = bridge.submodules.get("mlp")
        if mlp is None:
            return None
        return "mlp.hook_in" if mlp.name is not None else "mlp.in.hook_in"
    if kind == "mlp_normalized":
        # Where the MLP reads the stream as it is, this norm is another one, behind it.
        direct = getattr(bridge, "mlp_reads_resid_directly", False)
        return "ln2.hook_in" if "ln2" in bridge.submodules and not direct else None
    alias: str | None = bridge.hook_aliases.get(f"hook_{kind}")
    return alias


def _check_norm(model: PreTrainedModel, name: str) -> None:
    norm = model.get_submodule(name)
    if not can_leave_out_gain(norm):
        raise MismatchError(
            f"The SAE reads inside the norm {name!r}, before its gain, and how to leave out the gain of a "
            f"{type(norm).__name__} is not known. Use SAEs that read at resid_mid or mlp.hook_in."
        )


def check_placement(model: PreTrainedModel, saes: Sequence[SaeHandle]) -> list[Tap]:
    """Return the tap of every SAE after checking that the SAEs belong to the model.

    Returns:
        For each SAE the tensor that its encoder reads. (A transcoder's directions live elsewhere.)

    Raises:
        MismatchError: an SAE's width, hook point or model does not fit.
    """
    taps = []
    for handle in saes:
        identity = handle.identity
        tap, place = find_tap(model, identity.site_in), find_tap(model, identity.site)
        width, found = int(handle.sae.cfg.d_in), _site_width(model, tap)
        if width != found:
            raise MismatchError(
                f"SAE {identity.name!r} takes activations of width {width}, and {type(model).__name__} has "
                f"width {found} at {identity.hook_name_in or identity.hook_name}. Use SAEs that were trained on this "
                "model."
            )
        if identity.d_in != _site_width(model, place):
            raise MismatchError(
                f"SAE {identity.name!r} rebuilds activations of width {identity.d_in}, and {type(model).__name__} has "
                f"width {_site_width(model, place)} at {identity.hook_name}. Use SAEs that were trained on this model."
            )
        _check_model_name(model, identity.name, identity.model_name)
        taps.append(tap)
    return taps


def find_layout(model: PreTrainedModel) -> BlockLayout:
    """Return which modules of the model's blocks read and write which sites.

    Raises:
        MismatchError: the architecture is unknown to TransformerLens.
    """
    from transformer_lens.model_bridge.generalized_components import ParallelBlockBridge

    bridge, head, final_norm = _bridge_parts(model)
    parts = {name: part for name, part in bridge.submodules.items() if part is not None}
    norms = {name: ".".join(_remote_path(bridge, [name])) for name in parts if name.startswith("ln")}
    if _is_post_norm(bridge):
        return BlockLayout(bridge.name, _post_norm_roles(model, bridge, norms))
    parallel = isinstance(bridge, ParallelBlockBridge)
    after_attention = "resid_post" if parallel else "resid_mid"
    before_mlp = "resid_pre" if parallel else "resid_mid"
    roles: dict[str, tuple[ModuleRole, ...]] = {}
    block = model.get_submodule(_blocks_path(model, bridge.name))[0]
    width = _residual_width(model)
    for path in _linear_paths(block, bridge, "attn"):
        if path == ".".join(_remote_path(bridge, ["attn", "o"])):
            write = ModuleRole("write", after_attention, norms.get("ln1_post"))
            roles[path] = (write, ModuleRole("read", "z"))
        elif _features(block.get_submodule(path))[0] == width:
            roles[path] = (ModuleRole("read", "resid_pre", norms.get("ln1")),)
    for path in _linear_paths(block, bridge, "mlp"):
        inputs, outputs = _features(block.get_submodule(path))
        if inputs == width and not _is_output(path, bridge):
            roles[path] = (
                ModuleRole("read", before_mlp, norms.get("ln2", norms.get("ln1"))),
                ModuleRole("read", "mlp_in"),
            )
        elif outputs == width:
            roles[path] = (ModuleRole("write", "resid_post", norms.get("ln2_post")),)
    return BlockLayout(bridge.name, roles, head, final_norm)


def _is_post_norm(bridge: Any) -> bool:
    """Whether the norms follow the sums, as in BERT: then the first one belongs to the attention's output."""
    attention, norm = bridge.submodules.get("attn"), bridge.submodules.get("ln1")
    return attention is not None and norm is not None and str(norm.name).startswith(f"{attention.name}.")


def _post_norm_roles(
    model: PreTrainedModel, bridge: Any, norms: Mapping[str, str]
) -> dict[str, tuple[ModuleRole, ...]]:
    """Roles in a block whose stream is what the norms return: it is read as it is, and written through them."""
    block = model.get_submodule(_blocks_path(model, bridge.name))[0]
    output = ".".join(_remote_path(bridge, ["attn", "o"]))
    roles: dict[str, tuple[ModuleRole, ...]] = {}
    for path in _linear_paths(block, bridge, "attn"):
        roles[path] = (ModuleRole("read", "resid_pre"),)
    roles[output] = (ModuleRole("write", "resid_mid", norms["ln1"]), ModuleRole("read", "z"))
    for path in _linear_paths(block, bridge, "mlp"):
        written = _is_output(path, bridge)
        roles[path] = (ModuleRole("write", "resid_post", norms["ln2"]) if written else ModuleRole("read", "resid_mid"),)
    return roles


def _is_output(path: str, bridge: Any) -> bool:
    mlp = bridge.submodules["mlp"]
    if "out" not in mlp.submodules:
        return False
    ends = [part.name.split(".")[-1] for name, part in mlp.submodules.items() if name != "out" and part.name]
    last = mlp.submodules["out"].name.split(".")[-1]
    if last in ends:  # BERT calls all of them dense
        return path == ".".join(_remote_path(bridge, ["mlp", "out"]))
    return bool(path.split(".")[-1] == last)


def _linear_paths(block: nn.Module, bridge: Any, part: str) -> list[str]:
    """Names within the block of the linear modules that belong to `attn` or `mlp`."""
    component = bridge.submodules.get(part)
    if component is None:
        return []
    if component.name is not None:
        prefixes = [component.name]
    else:  # OPT keeps its MLP's layers directly in the block
        prefixes = [".".join(_remote_path(bridge, [part, child])) for child in component.submodules]
    return [
        name
        for name, module in block.named_modules()
        # What an adapter has put into a module is no module of the model.
        if not any(part == "base_layer" or part.startswith("lora_") for part in name.split("."))
        and any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
        and _features(module) is not None
    ]


def _features(module: Any) -> Any:
    """Input and output width of a linear module, whatever class holds its weight; None for others."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return int(module.in_features), int(module.out_features)
    return None


def _site_width(model: PreTrainedModel, tap: Tap) -> int:
    if tap.site.kind == "z":
        return int(_features(model.get_submodule(tap.module))[0])
    return _residual_width(model)


def _residual_width(model: PreTrainedModel) -> int:
    # Not the embeddings' width: some OPT models project between the two.
    return int(getattr(model.config.get_text_config(), "hidden_size"))  # noqa: B009 (unknown to the type checker)


def _check_model_name(model: PreTrainedModel, sae_name: str, trained_on: str | None) -> None:
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if trained_on and is_other_model(trained_on, model_type=model.config.model_type, name=name):
        raise MismatchError(
            f"SAE {sae_name!r} was trained on {trained_on!r}, and the model is {name!r} ({model.config.model_type}): "
            "its features would mean nothing there. Use SAEs of this model; if it is the same model under another "
            "name, set `sae.cfg.metadata.model_name = None`."
        )


def _remote_path(bridge: Any, path: Sequence[str]) -> list[str]:
    names, component = [], bridge
    for part in path:
        component = component.submodules[part]
        if component.name is not None:
            names.append(component.name)
    return names


def _blocks_path(model: PreTrainedModel, path: str) -> str:
    """The path of the list of blocks in the model at hand, which may be nested or without its head."""
    candidates = [path, path.split(".", 1)[-1]]
    candidates += [name for name, _ in model.named_modules() if name.endswith(f".{path.split('.', 1)[-1]}")]
    for candidate in candidates:
        try:
            if isinstance(model.get_submodule(candidate), nn.ModuleList):
                return candidate
        except AttributeError:
            continue
    raise MismatchError(
        f"{type(model).__name__} has no list of blocks at {path!r}, where TransformerLens expects it. Pass the plain "
        "causal language model."
    )


def _bridge_blocks(model: PreTrainedModel) -> Any:
    return _bridge_parts(model)[0]


def _bridge_parts(model: PreTrainedModel) -> tuple[Any, str | None, str | None]:
    """The bridge's description of a block, and the paths of the head and of the norm before it."""
    if not getattr(model.config, "do_layer_norm_before", True):
        raise MismatchError(
            f"{type(model).__name__} is configured with do_layer_norm_before=False: its norms come after the blocks' "
            "sums, so it has no residual stream for SAE features to lie in. Use a model with norms before."
        )
    components = _bridge_of(type(model).__name__, model.config)
    head, norm = (components.get(name) for name in ("unembed", "ln_final"))
    return components["blocks"], None if head is None else head.name, None if norm is None else norm.name


def _bridge_of(class_name: str, config: Any) -> Any:
    """The bridge's description of the parts of an architecture."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources import _bridge_builder, transformers

    config = copy.deepcopy(config)
    # A model made in code has no architecture in its config; its class is the better witness anyway.
    config.architectures = [class_name, *(config.architectures or [])]
    try:
        architecture = transformers.determine_architecture_from_hf_config(config)
        settings = dict(transformers.map_default_transformer_lens_config(config).__dict__)
        bridge_config = TransformerBridgeConfig.from_dict(settings)
        bridge_config.architecture = architecture
        for name in _bridge_builder._HF_PASSTHROUGH_ATTRS:
            value = getattr(transformers.get_effective_text_config(config), name, None)
            if value is not None:
                setattr(bridge_config, name, value)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
        components = adapter.component_mapping
        return {name: components.get(name) for name in ("unembed", "ln_final")} | {"blocks": components["blocks"]}
    except (ValueError, KeyError, AttributeError) as error:
        raise MismatchError(
            f"TransformerLens does not know the architecture {class_name} ({error}), so hook points cannot be placed "
            "in it. Use a model that it supports, or register an adapter with "
            "transformer_lens' ArchitectureAdapterFactory."
        ) from error
