"""The configuration of the tuner."""

from __future__ import annotations

import copy
import functools
import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftType

from ..errors import ArtifactError, ConfigError, PeftSaeError
from ..reading import check_inside
from ..subspace import Subspace
from .basis_record import NO_BASIS, SIDES, check_record
from .card import add_hint
from .card_section import put_section, subspace_section
from .field_types import check_choice, check_lora_types, refuse_unknown_fields

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
SUBSPACE_FOLDER = "subspace"
# What stands in a saved configuration for the folder beside it. The Hub has no such name.
BESIDE = "./subspace"
_LAYER_MAPS = ("nearest", "exact")
_LARGEST_RANK = 2**16  # few layers are that wide, and memory is taken for as much as a file says
_FILLS = ("orthogonal", "zeros", "error")


@dataclass
class SaeSubspaceConfig(LoraConfig):
    """A `LoraConfig` whose low-rank basis comes from a Subspace of SAE features.

    Every field of `LoraConfig` keeps its meaning. `r` may also be `"auto"`: each module then gets the rank
    of its own basis. A module that reads the residual stream has the basis in `lora_A`, and `lora_B`
    starts at zero; a module that writes it has the basis in `lora_B`, and `lora_A` starts at zero.

    Args:
        subspace: a `Subspace`, its folder, or its Hub id. Without one the adapter starts as plain LoRA, with
            a `MissingSubspaceWarning`.
        freeze_basis: train only the factor that does not hold the basis. What a writing module adds to the stream then
            stays in the span of the chosen features for good, and what a reading module reads stays in the span of what
            these features look like behind its norm. A norm behind a writing module (Gemma-2) in addition rescales, as
            a whole, what it is given; and beside protected features the basis is what is left of the chosen ones'
            directions without their part along these.
        norm_gain: carry the basis through the norm between the residual stream and the module.
        layer_map: `"nearest"` gives every module the nearest site along the residual stream; `"exact"` adapts
            only modules that touch a site within their block. What block 4 leaves in `resid_post` is touched by block
            4's writing modules and by block 5's reading ones.
        fill: what stands in for missing directions where `r` exceeds the basis: `"orthogonal"` (random
            directions orthogonal to it), `"zeros"`, or `"error"`.
        sides: side of modules (name or end of a name: `"read"`, `"write"`, or `"none"` for plain LoRA),
            where it is not known from the architecture or is to be another one.
        protect: which of the Subspace's features, that is of their decoder directions, the update can neither read
            nor write, whatever is trained: True for all that the Subspace protects, names such as
            `"blocks.12.hook_resid_post:4051"` or `"12:4051"` for some of its features, chosen or protected, False for
            none. It holds for every module of the adapter, behind its norm whatever `norm_gain` says, and up to the
            norm's common rescaling: one behind a writing module (Gemma-2) rescales what the base model writes along a
            protected direction with all the rest. What is trained beside the low-rank update (`modules_to_save`,
            `trainable_token_indices`) it does not bind, and the norms must stay as they are.
        basis_record: written at injection: the Subspace's digest, its model, and each module's side, hook point and
            number of directions from the basis, filled up, dropped, and protected. Not meant to be set by hand.

    Raises:
        ConfigError: unknown field, value out of range, or a combination that cannot work.
    """

    r: int | Literal["auto"] = field(
        default=8, metadata={"help": "LoRA's rank, or 'auto' for the rank of each module's own basis."}
    )
    subspace: str | Path | Subspace | None = field(
        default=None,
        metadata={"help": "A Subspace, its folder or its Hub id; without one the adapter starts as plain LoRA."},
    )
    freeze_basis: bool = field(
        default=False, metadata={"help": "Freeze the factor that holds the basis: the update stays in its span."}
    )
    norm_gain: bool = field(
        default=True, metadata={"help": "Carry the basis through the norm between residual stream and module."}
    )
    layer_map: Literal["nearest", "exact"] = field(
        default="nearest",
        metadata={
            "help": "'nearest': every module takes the nearest site. 'exact': only modules that touch one in their "
            "block."
        },
    )
    fill: Literal["orthogonal", "zeros", "error"] = field(
        default="orthogonal",
        metadata={"help": "What fills up a basis smaller than r: 'orthogonal', 'zeros' or 'error'."},
    )
    sides: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Module name (or its end) to 'read', 'write' or 'none', overriding the architecture."},
    )
    protect: bool | list[str] = field(
        default=True,
        metadata={
            "help": "Features that the update can neither read nor write: true for all that the Subspace protects, a "
            "list of names, or false."
        },
    )
    basis_record: dict[str, Any] | None = field(
        default=None, metadata={"help": "What injection recorded; not meant to be set by hand."}
    )

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except (TypeError, AttributeError, KeyError) as error:
            raise ConfigError(
                f"A field has a value of a wrong type ({error}). See LoraConfig for the types."
            ) from error
        self.peft_type = PeftType.SAE_SUBSPACE
        check_lora_types(self)
        if isinstance(self.subspace, Path):
            self.subspace = str(self.subspace)
        if self.subspace is not None and not isinstance(self.subspace, (str, Subspace)):
            raise ConfigError(
                f"subspace is a {type(self.subspace).__name__}, from which no basis can be had. Give a Subspace, a "
                "path, or a Hub id."
            )
        if self.r != "auto" and not _is_rank(self.r):
            raise ConfigError(f"r={self.r!r} is no rank. Give an integer from 1 to {_LARGEST_RANK}, or 'auto'.")
        check_choice("layer_map", self.layer_map, _LAYER_MAPS)
        check_choice("fill", self.fill, _FILLS)
        if not isinstance(self.sides, (dict, type(None))):
            raise ConfigError(f"sides={self.sides!r} is no mapping. Give module names with 'read', 'write' or 'none'.")
        patterns = self.rank_pattern if isinstance(self.rank_pattern, dict) else None
        if patterns is None or not all(_is_rank(rank) for rank in patterns.values()):
            raise ConfigError(
                f"rank_pattern={self.rank_pattern!r} is no mapping of names to integers from 1 to {_LARGEST_RANK}."
            )
        for module, side in (self.sides or {}).items():
            check_choice(f"sides[{module!r}]", side, SIDES)
        names: Any = self.protect if isinstance(self.protect, list) else None
        if not isinstance(self.protect, bool) and not (names is not None and all(isinstance(n, str) for n in names)):
            raise ConfigError(
                f"protect={self.protect!r} names no features. Give true, false, or a list of names such as '12:4051'."
            )
        check_record(self.basis_record)
        self._check_combinations()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the configuration of an adapter as PEFT does.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            subfolder: see `PeftConfig.from_pretrained`.
            **kwargs: see there.

        Raises:
            ArtifactError: the file is missing or damaged.
            ConfigError: it holds impossible values.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        check_inside(folder / CONFIG_FILE, folder)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except PeftSaeError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"The configuration of '{pretrained_model_name_or_path}' cannot be read ({type(error).__name__}: "
                f"{str(error)[:200]}); it is missing or damaged. Check the path, or save it again."
            ) from error

    def _check_combinations(self) -> None:
        if self.subspace is None and self.basis_record is None:
            wishes = {"freeze_basis=True": self.freeze_basis, "r='auto'": self.r == "auto"}
            wishes[f"protect={self.protect!r}"] = isinstance(self.protect, list) and bool(self.protect)
            for wish in (wish for wish, asked in wishes.items() if asked):
                raise ConfigError(f"{wish} needs a basis, and no subspace is given. Set `subspace`.")
            return
        if self.init_lora_weights not in (True, False):
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} and subspace both want to initialise the adapter. Leave "
                "init_lora_weights at True, or use peft_type 'LORA'."
            )
        if self.freeze_basis and self.bias != "none":
            raise ConfigError(
                f"freeze_basis=True and bias={self.bias!r} contradict each other: a trained bias of a writing module "
                "adds what is not in the span of the frozen basis. Use bias='none', or freeze_basis=False."
            )
        if self.freeze_basis and self.use_dora:
            raise ConfigError(
                "freeze_basis=True and use_dora=True contradict each other: DoRA's magnitude rescales what the base "
                "weights read and write, so the change leaves the frozen basis. Use one of the two."
            )
        if self.layer_replication:
            raise ConfigError(
                "layer_replication changes which block is which, so the sites of the subspace would be mistaken. Use "
                "one of the two."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as data; a Subspace object becomes the name of its folder."""
        plain = copy.copy(self)
        if isinstance(self.subspace, Subspace):
            plain.subspace = BESIDE
        return dict(LoraConfig.to_dict(plain))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and the Subspace in a folder beside it.

        Args:
            save_directory: the adapter's folder.
            **kwargs: as in PEFT.
        """
        plain = self
        subspace = self.own_subspace()
        if subspace is not None:
            subspace.save_pretrained(Path(save_directory) / SUBSPACE_FOLDER)
            plain = copy.copy(self)
            plain.subspace = BESIDE
        super(SaeSubspaceConfig, plain).save_pretrained(save_directory, **kwargs)
        add_hint(save_directory, None if subspace is None else functools.partial(self._describe, subspace=subspace))

    def _describe(self, card: str, name: str, *, subspace: Subspace) -> str:
        return put_section(card, subspace_section(self, subspace, name), f"features {name}")

    def remember_subspace(self, subspace: Subspace) -> None:
        """Keep the Subspace that the adapter was built from, so that it can be saved along with it."""
        self._used_subspace = subspace

    def protects_something(self) -> bool:
        """Return whether injection has recorded protected directions."""
        modules = {} if self.basis_record is None else self.basis_record["modules"]
        return any(entry["protected_read"] or entry["protected_write"] for entry in modules.values())

    def check_swap(self, other: SaeSubspaceConfig) -> None:
        """Refuse another adapter's weights in place of this one's where they would not be kept alike.

        Raises:
            ConfigError: one has a frozen basis or protected features, and the other has not.
        """
        for what, own, new in (
            ("freeze_basis", self.freeze_basis, other.freeze_basis),
            ("protected features", self.protects_something(), other.protects_something()),
        ):
            if own != new:
                raise ConfigError(
                    f"The adapter in the model has {what}: {own}, and the one to be swapped in: {new}, so its factors "
                    "would be trained, or frozen, against its own configuration. Load it under another name instead."
                )

    def adopt_basis(self, other: SaeSubspaceConfig | None) -> None:
        """Take over what another configuration says of its basis; None for weights of unknown origin."""
        if other is None:
            self.subspace, self.basis_record = None, copy.deepcopy(NO_BASIS)
        else:
            for name in ("subspace", "norm_gain", "layer_map", "fill", "sides", "protect", "basis_record"):
                setattr(self, name, copy.deepcopy(getattr(other, name)))
        self.__dict__.pop("_used_subspace", None)

    def forget_automatic_ranks(self) -> None:
        """Put back `r="auto"` where an earlier injection replaced it and nobody has set `r` since."""
        if self.basis_record is None or self.basis_record["automatic_r"] != self.r:
            return
        modules = self.basis_record["modules"]
        pattern: dict[str, int] = vars(self)["rank_pattern"]
        self.rank_pattern = {name: rank for name, rank in pattern.items() if name not in modules}
        self.r = "auto"

    def own_subspace(self) -> Subspace | None:
        """Return the Subspace that goes along with an adapter, if it is there; a mere path in a config stays a path."""
        if isinstance(self.subspace, Subspace):
            return self.subspace
        used: Subspace | None = getattr(self, "_used_subspace", None)
        if used is not None or self.basis_record is None or not Path(str(self.subspace)).is_dir():
            return used  # the Hub is never asked for the sake of saving
        try:
            subspace = Subspace.from_pretrained(str(self.subspace))
        except ArtifactError as error:
            logger.warning("The adapter is saved without its Subspace, which is no longer there: %s", error)
            return None
        return subspace if subspace.digest == self.basis_record["digest"] else None


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_RANK


SaeSubspaceConfig.__init__ = refuse_unknown_fields(  # type: ignore[method-assign]
    SaeSubspaceConfig.__init__, [entry.name for entry in fields(SaeSubspaceConfig) if entry.init]
)
