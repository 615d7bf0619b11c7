"""Every SAE method of the safety benchmark beside the best of the others that were trained on the same requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.common import summary
from benchmarks.safety.catalogue import DANGEROUS, ONLY, control_name, plain_name
from benchmarks.safety.report import OUT, OUT_HELP, VALIDATION, Rows, cell, of_method, paired, per_base, points
from benchmarks.sources import Source
from peft_sae.subspace.controls import CONTROLS

DATA = {"all requests": False, "neutral requests only": True}
_CONTROLS = (*CONTROLS, "mean difference, best parts")
_INITIALISATIONS = ("LoRA", "DoRA", "PiSSA", "OLoRA", "MiCA", "EVA", "CorDA", "LoRA-GA")


class Compared:
    """One SAE method beside what it is compared with, all trained on the same requests.

    Args:
        name: of the method.
        groups: rows of every method.
        peer: the start of PEFT's to compare with; the safest out of distribution, if none is named.
        control: the same of the bases without an SAE.
    """

    def __init__(self, name: str, groups: Mapping[str, Rows], *, peer: str = "", control: str = "") -> None:
        only = ONLY if ONLY in name else ""
        controls = [f"{control_name(kind)}{only}{frozen}" for kind in _CONTROLS for frozen in ("", ", frozen")]
        self.name, self._groups = name, groups
        self.full = f"full fine-tuning{only}"
        self._peers = [
            each for each in groups if each.split(",")[0] in _INITIALISATIONS and (ONLY in each) is bool(only)
        ]
        self._is_named = bool(peer)
        self.peer = peer or self._safest(self._peers)
        self.control = control or self._safest([each for each in controls if each in groups])

    def on(self, groups: Mapping[str, Rows]) -> Compared | None:
        """Return the same comparison on other bases; None if one of its methods was not run there."""
        if not {self.name, self.full, self.peer, self.control} <= groups.keys():
            return None
        return Compared(self.name, groups, peer=self.peer, control=self.control)

    def _safest(self, names: Sequence[str]) -> str:
        return max(names, key=lambda name: self.interval(name)["mean"], default="")

    @property
    def is_complete(self) -> bool:
        """Whether there is something of each kind to compare with."""
        return bool(self.full in self._groups and self.peer and self.control)

    @property
    def standing(self) -> str:
        """What the start of PEFT's is among its like."""
        if not self._is_named:
            return f"the safest of {len(self._peers)} starts of PEFT's on these data"
        here = self._safest(self._peers)
        return (
            f"the safest start of PEFT's{self.where}"
            f"{'' if here == self.peer else f' (here, of {len(self._peers)}: {plain_name(here)})'}"
        )

    @property
    def where(self) -> str:
        """Which bases the others were found on."""
        return " on the other bases" if self._is_named else ""

    def interval(self, name: str) -> Mapping[str, float]:
        """Safety out of distribution."""
        return summary(list(per_base(self._groups[name], OUT).values()))

    def minus(self, other: str, column: str = OUT) -> Mapping[str, float]:
        """Its difference to another method, paired by base."""
        return paired(self._groups[self.name], self._groups[other], column)

    def wins(self, other: str) -> str:
        """On how many bases it is safer than another method."""
        ours, theirs = (per_base(self._groups[name], OUT) for name in (self.name, other))
        both = ours.keys() & theirs.keys()
        return f"safer on {sum(ours[base] > theirs[base] for base in both)} of {len(both)} bases"

    @property
    def apart(self) -> bool:
        """Whether its interval lies above those of full fine-tuning and of the start of PEFT's."""
        return self.interval(self.name)["low"] > max(self.interval(each)["high"] for each in (self.full, self.peer))

    def cells(self) -> list[str]:
        """Its line of the table."""
        gaps = [points(self.minus(each)) for each in (self.full, self.peer, self.control)]
        loss = cell("corpus loss", self.minus(self.full, "corpus loss"), "+")
        return [plain_name(self.name), *gaps, points(self.minus(self.full, OUT_HELP)), loss]


def groups_of(source: Source, table: str = "main") -> dict[str, Rows]:
    """Return, by method, the rows of a table with the usual number of topics."""
    rows = source.read(f"result-{table}.json").get("rows", [])
    return {name: of_method(rows, name, DANGEROUS) for name in dict.fromkeys(row["method"] for row in rows)}


def compared(groups: Mapping[str, Rows], *, neutral: bool) -> list[Compared]:
    """Every SAE method beside what there is on the same requests; none if there is not something of each kind."""
    names = [name for name in groups if name.startswith("SAE") and (ONLY in name) is neutral]
    return [each for name in names if (each := Compared(name, groups)).is_complete]


def best_by_validation(groups: Mapping[str, Rows], found: Sequence[Compared]) -> Compared:
    """The method with the highest validation score."""
    return max(found, key=lambda each: summary(list(per_base(groups[each.name], VALIDATION).values()))["mean"])


def chosen(source: Source) -> Iterator[tuple[str, Compared | None]]:
    """Yield, by data, the frozen and the trainable method with the highest validation score; None without either."""
    groups = groups_of(source)
    for data, neutral in DATA.items():
        methods = compared(groups, neutral=neutral)
        if not methods:
            yield data, None
        for frozen in (True, False):
            kind = [each for each in methods if ("frozen" in each.name) is frozen]
            if kind:
                yield data, best_by_validation(groups, kind)


def confirmed(source: Source) -> Iterator[tuple[str, Compared | None]]:
    """Yield the same comparisons on the bases of `confirm`; None for what was not run there."""
    groups = groups_of(source, "confirm")
    for data, found in chosen(source):
        yield data, found and found.on(groups)
