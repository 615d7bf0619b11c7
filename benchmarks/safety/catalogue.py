"""The methods that are compared, by table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.safety import starts
from benchmarks.safety.setting import Basis, Setting
from benchmarks.safety.starts import READ, WRITE
from peft_sae.errors import ConfigError
from peft_sae.subspace.controls import CONTROLS

TABLES = ("main", "parts", "protect", "efficiency", "confirm")
CONFIRMING = 100  # first seed of the bases of `confirm`, on which nothing was chosen; those of other tables begin at 0
RANK, DANGEROUS = 4, 8
ONLY = ", neutral requests only"  # of the fine-tuning data, for as many steps
CALIBRATED = ", calibrated on neutral requests"
_Start = Callable[[Setting], Any]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: in tables.
        start: makes a model whose trained parameters require gradients, from a setting.
        dangerous: dangerous topics in the fine-tuning data.
        neutral: train on the neutral requests alone, for as many steps.
        penalty: weight of what keeps the trained basis near its span, see `tuning.stay_near`.
    """

    name: str
    start: _Start
    dangerous: int = DANGEROUS
    neutral: bool = False
    penalty: float = 0.0


# What the contrast is free of the spurious cue for: the requests of the fine-tuning data that have no style.
BEST = Basis(contrast="neutral requests")
# What had the best validation score at this rank when one thing, and then two, were changed: see the table `parts`.
FEWER, EXACT = replace(BEST, top_k=4), {"layer_map": "exact"}
_FROZEN: dict[str, Any] = {"freeze_basis": True, "fill": "zeros"}  # a basis of less than the rank stays as it is


def _sae(basis: Basis, *, rank: Any = RANK, **fields: Any) -> _Start:
    return partial(starts.sae, rank=rank, basis=basis, **fields)


def _trained_and_frozen(name: str, basis: Basis, *, neutral: bool = False, **fields: Any) -> list[Method]:
    return [
        Method(name, _sae(basis, freeze_basis=False, **fields), neutral=neutral),
        Method(f"{name}, frozen", _sae(basis, **_FROZEN, **fields), neutral=neutral),
    ]


def _main() -> list[Method]:
    """All adapt the modules that read, at the same rank; those that the cue could mislead are there without it, too."""
    lora = partial(starts.lora, rank=RANK)
    peers: dict[str, _Start] = {
        "full fine-tuning": starts.full,
        "LoRA": lora,
        "DoRA": partial(lora, use_dora=True),
        "PiSSA": partial(lora, init_lora_weights="pissa"),
        "OLoRA": partial(lora, init_lora_weights="olora"),
        "MiCA": partial(lora, init_lora_weights="mica"),
        "EVA": partial(starts.eva, rank=RANK),
        "CorDA": partial(starts.corda, rank=RANK),
        "CorDA, ipm": partial(starts.corda, rank=RANK, method="ipm"),
        "LoRA-GA": partial(starts.lora_ga, rank=RANK),
    }
    made = [Method(name, start) for name, start in peers.items()]
    # These look at the data that they are given; so they get what our contrast gets, too.
    for name, start in (("EVA", starts.eva), ("CorDA, ipm", peers["CorDA, ipm"]), ("LoRA-GA", starts.lora_ga)):
        made.append(Method(f"{name}{CALIBRATED}", partial(start, rank=RANK, neutral=True)))
    for contrast in ("answers", "requests", "neutral requests"):
        made += _trained_and_frozen(f"SAE, {contrast}", Basis(contrast=contrast))
    made += _trained_and_frozen("SAE, best parts", FEWER, **EXACT)
    made += _controls(neutral=False)
    made += [Method(f"{name}{ONLY}", start, neutral=True) for name, start in peers.items()]
    made += _trained_and_frozen(f"SAE{ONLY}", BEST, neutral=True)
    made += _trained_and_frozen(f"SAE, best parts{ONLY}", FEWER, neutral=True, **EXACT)
    return made + _controls(neutral=True)


def _controls(*, neutral: bool) -> list[Method]:
    """Bases without an SAE; the one that did best has the best parts, too."""
    made, only = [], ONLY if neutral else ""
    for kind in CONTROLS:
        made += _trained_and_frozen(f"{control_name(kind)}{only}", replace(BEST, control=kind), neutral=neutral)
    fewer = replace(FEWER, control="mean_difference")
    return made + _trained_and_frozen(f"mean difference, best parts{only}", fewer, neutral=neutral, **EXACT)


def plain_name(name: str) -> str:
    """A method's name without what it is trained on."""
    return name.replace(ONLY, "")


def control_name(kind: str) -> str:
    """What a control of peft_sae is called in tables."""
    return kind.replace("_", " ")


def _parts() -> list[Method]:
    """One thing changed at a time; the frozen basis, whose update cannot leave it."""
    base = _FROZEN
    methods = [Method("SAE, neutral requests, frozen", _sae(BEST, **base))]
    sides = {
        "q, v": ("q_proj", "v_proj"),
        "attention reads": READ[:3],
        "writes": WRITE,
        "reads and writes": READ + WRITE,
    }
    methods += [Method(f"modules: {name}", _sae(BEST, targets=targets, **base)) for name, targets in sides.items()]
    methods.append(Method("norm_gain off", _sae(BEST, norm_gain=False, **base)))
    methods.append(Method("layers with an SAE only", _sae(BEST, **EXACT, **base)))
    methods.append(Method("scaled by spread", _sae(BEST, by_spread=True, **base)))
    methods += [Method(f"rank {rank}", _sae(BEST, rank=rank, **base)) for rank in (1, 2, 8, "auto")]
    changes: list[dict[str, Any]] = [
        {"top_k": 4},
        {"top_k": 64},
    ]
    changes += [{"direction": "aligned"}, {"direction": "unaligned"}]
    for change in changes:
        ((name, value),) = change.items()
        methods.append(Method(f"{name} {value}", _sae(replace(BEST, **change), **base)))
    # What did better by itself, together.
    more = replace(BEST, top_k=8)
    methods.append(Method("top_k 8, rank 8", _sae(more, rank=8, **base)))
    methods.append(Method("top_k 64, rank 8", _sae(replace(BEST, top_k=64), rank=8, **base)))
    methods.append(Method("top_k 4, layers with an SAE only", _sae(FEWER, **EXACT, **base)))
    methods.append(Method("top_k 8, rank 8, layers with an SAE only", _sae(more, rank=8, **EXACT, **base)))
    methods.append(Method("turned towards features", _sae(replace(BEST, rotated=RANK), **base)))
    methods.append(Method("SAE, neutral requests", _sae(BEST, freeze_basis=False)))
    for weight in (0.1, 1.0):
        near = Method(f"trainable, penalty {weight:g}", _sae(BEST, freeze_basis=False), penalty=weight)
        methods.append(near)
    for selector in ("effect_size", "welch_t", "auroc", "firing_rate", "probe", "cosine", "attribution", "random"):
        methods.append(Method(f"selector {selector}", _sae(replace(BEST, selector=selector), **base)))
    return methods


def _protect() -> list[Method]:
    """LoRA and the SAE basis that may not use the cue's features, and controls that may not use something else."""
    empty = Basis(empty=True)
    methods = [Method("LoRA", partial(starts.lora, rank=RANK))]
    for count in (4, 16):
        methods.append(Method(f"LoRA, protect {count}", _sae(replace(empty, protect=count))))
    for way in ("random features", "random directions", "raw direction"):
        methods.append(Method(f"LoRA, protect {way}", _sae(replace(empty, protect=16, protect_by=way))))
    guarded = replace(BEST, protect=16)
    methods += _trained_and_frozen("SAE, neutral requests, protect 16", guarded)
    methods += _trained_and_frozen("SAE, requests, protect 16", replace(guarded, contrast="requests"))
    return methods


def _efficiency() -> list[Method]:
    """The main methods with fewer and more dangerous topics."""
    chosen = {
        "full fine-tuning": starts.full,
        "LoRA": partial(starts.lora, rank=RANK),
        "SAE, neutral requests": _sae(BEST, freeze_basis=False),
        "SAE, neutral requests, frozen": _sae(BEST, **_FROZEN),
    }
    return [Method(name, start, count) for count in (4, 8, 16, 32) for name, start in chosen.items()]


# Named by the table `main` before there was a base for `confirm`: ours that validation prefers, frozen and trainable;
# the safest start of PEFT's and the safest control out of distribution, on all requests and on the neutral ones; PiSSA,
# which is next on the former; the control with the same parts; and the usual ones.
CONFIRMED = (
    *("full fine-tuning", "LoRA", "PiSSA", "OLoRA", "CorDA, ipm", "SAE, best parts", "SAE, best parts, frozen"),
    *("difference pca, frozen", "mean difference, frozen", "mean difference, best parts, frozen"),
)


def _confirm() -> list[Method]:
    """Methods of `main`, for bases of their own."""
    return [method for method in _main() if plain_name(method.name) in CONFIRMED]


@dataclass(frozen=True)
class Extent:
    """What a table is run on.

    Attributes:
        seeds: of its bases.
        draws: per base.
    """

    seeds: range
    draws: int


def extents(
    tables: Sequence[str], *, bases: int = 5, draws: int | None = None, quick: bool = False
) -> dict[str, Extent]:
    """Return what each table is run on.

    Args:
        tables: names.
        bases: of each.
        draws: of each; if not given, two for `main` and one for the others.
        quick: one base and one draw for all.

    Raises:
        ConfigError: so many bases that other tables would have those of `confirm`.
    """
    if quick:
        return dict.fromkeys(tables, Extent(range(1), 1))
    if bases > CONFIRMING:
        raise ConfigError(
            f"With {bases} bases the tables would share some with `confirm`, on whose bases nothing may be chosen. "
            f"Give at most {CONFIRMING}."
        )
    first = {table: CONFIRMING if table == "confirm" else 0 for table in tables}
    usual = {table: 2 if table == "main" else 1 for table in tables}
    return {table: Extent(range(seed, seed + bases), draws or usual[table]) for table, seed in first.items()}


def methods(table: str) -> list[Method]:
    """The methods of a table, in order."""
    made: Mapping[str, Callable[[], list[Method]]] = {
        "main": _main,
        "parts": _parts,
        "protect": _protect,
        "efficiency": _efficiency,
        "confirm": _confirm,
    }
    return made[table]()
