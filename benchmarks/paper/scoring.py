"""Scores of answers, cached one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks.paper.judging import Item, Judge, Verdict, judge_identity
from benchmarks.paper.lines import key_of, open_lines
from benchmarks.paper.specs import JudgeSpec


def score(
    load: Callable[[], Judge], spec: JudgeSpec, items: Sequence[Item], path: Path, *, label: str, progress: bool
) -> list[Verdict]:
    """Have answers scored, except those whose scores are there already. Equal answers to a prompt are judged once.

    That a judge refuses to score, or cannot be read, is kept like a score; it is asked again when the line is removed
    from the cache.

    Args:
        load: gives the judge, and is only called if there is something to do.
        spec: of the judge.
        items: what is scored.
        path: the cache.
        label: of the progress bar.
        progress: show it.

    Raises:
        JudgeError: the judge cannot be asked; what it said before is kept.
    """
    keys = [key_of("score", judge_identity(spec, item.kind), item.prompt, item.answer) for item in items]
    with open_lines(path) as cache:
        left = {key: item for key, item in zip(keys, items, strict=True) if key not in cache}
        if left:
            names = list(left)
            with tqdm(total=len(left), desc=label, unit=" scores", disable=not progress) as bar:
                for index, verdict in load().score(list(left.values())):
                    cache.add(names[index], asdict(verdict))
                    bar.update()
        return [Verdict(**cache[key]) for key in keys]
