"""Where the modules of a decoder block read and write, as plain data.

The layout is found once, with the model at hand, and travels inside the Subspace. So injecting an
adapter needs neither a table of architectures nor the libraries that know them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from .errors import ArtifactError, MismatchError

Side = Literal["read", "write"]
SITE_KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "mlp_in")
# Not in the residual stream: each block has a space of its own there.
LOCAL_KINDS = ("z", "mlp_in")

# How far along the residual stream a kind of site lies, in half blocks. What attention adds is
# first seen in resid_mid and what the MLP adds in resid_post, so their outputs share those places.
_HALF_STEPS = {"resid_pre": 0, "attn_out": 1, "resid_mid": 1, "mlp_out": 2, "resid_post": 2}
_HOOK_NAME = re.compile(
    r"blocks\.([0-9]{1,4})\.(?:(?:attn\.)?hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out|z|mlp_in)"
    r"|(mlp\.hook_in|ln2\.hook_normalized))"
)
# Hook names whose kind is not in the name:
# - mlp.hook_in is what the MLP is given, behind the norm and its gain (TransformerLens' bridge, circuit-tracer).
# - hook_mlp_in is what that norm is given: both HookedTransformer and the bridge put it before ln2, on a copy of
#   resid_mid, in spite of its name. (sae-lens' Gemma Scope 2 loader means mlp.hook_in by it: see `make_handle`.)
# - ln2.hook_normalized lies inside the norm, before its gain and bias, whether or not these are folded into the MLP.
_OTHER_KINDS = {"mlp.hook_in": "mlp_in", "mlp_in": "resid_mid", "ln2.hook_normalized": "mlp_normalized"}


@dataclass(frozen=True)
class Site:
    """A place in the model where directions live.

    Attributes:
        block: index of the decoder block, from 0.
        kind: one of `SITE_KINDS`. `z` is the concatenated output of the heads, before the output
            projection; `mlp_in` is the input of the MLP, behind its norm. All but `z` are `d_model` wide.
            A transcoder's encoder may also read at `mlp_normalized`, inside the norm before the MLP: what it makes
            of the stream before its gain and bias.
    """

    block: int
    kind: str

    @classmethod
    def from_hook_name(cls, hook_name: str, *, encoder: bool = False) -> Site:
        """Parse a TransformerLens hook name such as `blocks.12.hook_resid_post`.

        Args:
            hook_name: the hook name.
            encoder: whether only an encoder is to read there, which may be inside a norm too.

        Raises:
            MismatchError: the hook name is not one of a block's sites.
        """
        match = _HOOK_NAME.fullmatch(hook_name)
        part = "" if match is None else match[2] or match[3]
        kind = _OTHER_KINDS.get(part, part)
        if match is None or (kind not in SITE_KINDS and not encoder):
            raise MismatchError(
                f"Hook point {hook_name!r} is not supported: a basis can be placed only at "
                f"{', '.join(SITE_KINDS)} of a block (for example 'blocks.12.hook_resid_post'). "
                "Choose SAEs trained at one of these."
            )
        return cls(block=int(match[1]), kind=kind)

    @property
    def half_steps(self) -> int | None:
        """Position along the residual stream in half blocks; None for `z` and `mlp_in`, which are not in it."""
        step = _HALF_STEPS.get(self.kind)
        return None if step is None else 2 * self.block + step


@dataclass(frozen=True)
class ModuleRole:
    """What one module does at one site of its block.

    Attributes:
        side: `read` if the module's input comes from the site, `write` if its output is added to it.
        site: kind of the site, one of `SITE_KINDS`.
        norm: path within the block of the norm between site and module, or None.
    """

    side: Side
    site: str
    norm: str | None = None


@dataclass(frozen=True)
class BlockLayout:
    """Roles of the modules in every decoder block of one architecture.

    Attributes:
        blocks: path of the list of blocks in the causal language model, for example `model.layers`.
        roles: path within a block, for example `self_attn.q_proj`, to the module's roles. The first
            role is the usual one.
        head: path in the causal language model of the module that reads the stream behind the last block, or None.
        final_norm: path in it of the norm between the two, or None.
    """

    blocks: str
    roles: Mapping[str, tuple[ModuleRole, ...]]
    head: str | None = None
    final_norm: str | None = None

    def locate(self, module_name: str) -> tuple[str, int, str] | None:
        """Split a module's name into the path of its block, the block's index and the rest.

        Returns:
            None if the module is in no decoder block. A model that is nested in another one, or
            that has lost its head, is recognised by the common end of the two paths.
        """
        for match in re.finditer(r"(?:^|\.)(\d+)\.", module_name):
            prefix = module_name[: match.start()]
            if _is_path_suffix(prefix, self.blocks) or _is_path_suffix(self.blocks, prefix):
                block_path = f"{prefix}.{match[1]}" if prefix else match[1]
                return block_path, int(match[1]), module_name[match.end() :]
        return None

    def locate_head(self, module_name: str) -> str | None:
        """Return what precedes the head's path in a module's name, `""` or a path with a dot; None if it is another."""
        if self.head is None or not _is_path_suffix(self.head, module_name):
            return None
        return module_name[: len(module_name) - len(self.head)]

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as JSON-serialisable data."""
        roles = {path: [asdict(role) for role in roles] for path, roles in self.roles.items()}
        return {"blocks": self.blocks, "roles": roles, "head": self.head, "final_norm": self.final_norm}

    @classmethod
    def from_dict(cls, data: Any) -> BlockLayout:
        """Build a layout from the data of `to_dict`.

        Raises:
            ArtifactError: the data has not the expected form.
        """
        try:
            roles = {
                str(path): tuple(_role_from_dict(entry) for entry in entries) for path, entries in data["roles"].items()
            }
            ends = [None if data[name] is None else str(data[name]) for name in ("head", "final_norm")]
            return cls(str(data["blocks"]), roles, *ends)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtifactError(
                f"The block layout is malformed ({error!r}), so the modules' sides are unknown. "
                "Build the Subspace again."
            ) from error


def _role_from_dict(entry: Mapping[str, Any]) -> ModuleRole:
    side, site, norm = entry["side"], entry["site"], entry["norm"]
    if side not in ("read", "write") or site not in SITE_KINDS:
        raise ValueError(f"unknown role {dict(entry)!r}")
    return ModuleRole(side=cast(Side, side), site=site, norm=None if norm is None else str(norm))


def _is_path_suffix(suffix: str, path: str) -> bool:
    return suffix == "" or path == suffix or path.endswith(f".{suffix}")
