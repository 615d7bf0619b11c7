"""What an adapter's model card says of the features that it was built from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..escape import in_address, in_markdown
from ..subspace import Subspace
from ..subspace.protected import ProtectedSite
from ..subspace.site import SubspaceSite

if TYPE_CHECKING:
    from .config import SaeSubspaceConfig

_FEATURES, _TOKENS = 8, 5  # per hook point, per feature
_SETTINGS = ("selector", "top_k", "variance")
_STATISTICS = ("tokens", "pooling", "examples", "data")


def subspace_section(config: SaeSubspaceConfig, subspace: Subspace, name: str = "") -> str:
    """Return Markdown on an adapter's features and where they come from.

    Args:
        config: the adapter's configuration.
        subspace: the Subspace that it was built from.
        name: the adapter's name, if the card is of several.
    """
    about = f" of the adapter {in_markdown(name)}" if name else ""
    lines = [f"## Features{about}", "", _explanation(config, subspace), ""]
    if subspace.sites:
        lines += ["| hook point | SAE | rank | features | best ones, and tokens that they promote |"]
        lines += ["|---|---|---:|---:|---|", *(_row(site) for site in subspace.sites), ""]
    if subspace.protected:
        lines += ["Protected features, which the update can neither read nor write:", ""]
        lines += ["| hook point | SAE | features |", "|---|---|---|"]
        lines += [_protected_row(site) for site in subspace.protected] + [""]
    lines += [f"- {label}: {value}" for label, value in _provenance(config, subspace)]
    lines += ["", "`peft-sae inspect ADAPTER` shows what the update does with them."]
    return "\n".join(lines)


def put_section(body: str, section: str, label: str) -> str:
    """Return a card's text with a section in it, in place of the earlier one of its label or before all others.

    Args:
        body: the text under the card's front matter.
        section: Markdown.
        label: tells sections apart: `features`, with the adapter's name behind it where the card is of several.
    """
    safe = re.sub(r"[^A-Za-z0-9_. ]", "_", label).rstrip()
    begin, end = f"<!-- peft_sae {safe} -->", f"<!-- end of peft_sae {safe} -->"
    section = f"{begin}\n{section.rstrip()}\n{end}\n"
    found = re.search(rf"{re.escape(begin)}.*?{re.escape(end)}\r?\n?", body, re.DOTALL)
    if found is not None:
        return body[: found.start()] + section + body[found.end() :]
    first = re.search(r"^(<!-- peft_sae |## )", body, re.MULTILINE)
    if first is None:
        return f"{body.rstrip()}\n\n{section}"
    return f"{body[: first.start()]}{section}\n{body[first.start() :]}"


def _explanation(config: SaeSubspaceConfig, subspace: Subspace) -> str:
    if not subspace.sites:
        return "The low-rank update keeps away from features of sparse autoencoders (SAEs)."
    stays = (
        "stays in their span (`freeze_basis=True`)"
        if config.freeze_basis
        else "started from their span and may have moved away from it in training"
    )
    return (
        "The low-rank update was built from decoder directions of sparse-autoencoder (SAE) features, which were chosen "
        f"with data of the task. It {stays}."
    )


def _row(site: SubspaceSite) -> str:
    best = [
        _feature(site, feature, tokens)
        for feature, tokens in list(zip(site.features.tolist(), site.tokens, strict=True))[:_FEATURES]
    ]
    more = len(site.features) - len(best)
    cells = [
        f"`{site.sae.hook_name}`",
        in_markdown(site.sae.name),
        str(site.rank),
        str(len(site.features)),
        "<br>".join(best) + (f"<br>and {more} more" if more else ""),
    ]
    return f"| {' | '.join(cells)} |"


def _protected_row(site: ProtectedSite) -> str:
    shown = [_feature(site, one, tokens) for one, tokens in zip(site.features.tolist(), site.tokens, strict=True)]
    more = len(shown) - _FEATURES
    features = "<br>".join(shown[:_FEATURES]) + (f"<br>and {more} more" if more > 0 else "")
    return f"| `{site.sae.hook_name}` | {in_markdown(site.sae.name)} | {features} |"


def _feature(site: SubspaceSite | ProtectedSite, feature: int, tokens: Sequence[str]) -> str:
    address = site.sae.neuronpedia_url(feature)
    name = f"[{feature}](<{in_address(address)}>)" if address else str(feature)
    words = " ".join(in_markdown(token.strip(" ") or "␣") for token in tokens[:_TOKENS])
    return f"{name}: {words}" if words else name


def _provenance(config: SaeSubspaceConfig, subspace: Subspace) -> list[tuple[str, str]]:
    model = {key: value for key, value in subspace.model.items() if isinstance(value, (str, int)) and value != ""}
    found = [("model of the features", _flat(model))]
    settings = {key: subspace.settings[key] for key in _SETTINGS if key in subspace.settings}
    if settings:
        found.append(("how they were chosen", _flat(settings)))
    statistics = subspace.settings.get("statistics")
    if isinstance(statistics, Mapping):
        known = {key: statistics[key] for key in _STATISTICS if key in statistics}
        found.append(("texts they were chosen with", _flat(known)))
    basis = {"norm_gain": config.norm_gain, "layer_map": config.layer_map, "freeze_basis": config.freeze_basis}
    found.append(("where the basis goes", _flat(basis)))
    found.append(("digest of the Subspace", f"`{subspace.digest}`"))
    return [*found, ("built with", _flat(subspace.versions))]


def _flat(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{in_markdown(str(key))} {in_markdown(value if isinstance(value, str) else json.dumps(value, default=str))}"
        for key, value in values.items()
    )
