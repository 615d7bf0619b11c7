"""The page that the suite writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.parity.harness import KINDS

HEAD = """# What LoRA can do, and SAE_SUBSPACE too

Each row is a test in `tests/parity`, run by the same code on all three; this page is written by
`make parity`. "refused" is an error that says why and what to do instead. Tested with peft {peft},
transformers {transformers}, torch {torch}.

With protected features, refused as well: DoRA and other variants whose update is not its two factors, trained biases of
the base model, embeddings, convolutions and `target_parameters`, a head tied to the embedding, combining adapters that
protect different features or were loaded only to be run, hot swapping while training, reducing intruder dimensions.

"""


def write_table(path: str, results: Mapping[str, Mapping[str, str]]) -> None:
    from importlib.metadata import version

    versions = {name: version(name) for name in ("peft", "transformers", "torch")}
    versions["torch"] = versions["torch"].split("+")[0]
    lines = [f"| Ability | {' | '.join(KINDS)} |", f"|---|{'---|' * len(KINDS)}"]
    lines += [f"| {name} | {' | '.join(row.get(kind, 'not run') for kind in KINDS)} |" for name, row in results.items()]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(HEAD.format(**versions) + "\n".join(lines) + "\n", encoding="utf-8")
