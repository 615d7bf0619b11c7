"""Changing the files of an artefact one after another, and loading it each time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_sae.artifact import digest
from peft_sae.errors import PeftSaeError

from .guard import pipes_are_left_alone, watched
from .mutations import OUTSIDE, Change, build, changes, parse
from .oracles import read_tensors

# Changed files by kind of artefact; cheap loads take most. A larger campaign multiplies them.
EXAMPLES = {
    "subspace": 600,
    "statistics": 600,
    "state": 250,
    "config": 500,
    "edits": 200,
    "job": 150,
    "selection": 150,
    "export": 120,
    "merge": 60,
    "inspect": 150,
    "edit": 120,
    "load": 100,
}
KINDS = {".json": "json", ".yaml": "json", ".safetensors": "tensors", ".state": "state"}
TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
SEED = os.environ.get("FUZZ_SEED")


class Artefact:
    """A folder whose files are changed and put back.

    Args:
        root: a folder with the artefact in `artefact` and another good one, which must not be read, beside it.
        names: of the files to change, as paths in `artefact`.
        sign: makes a digest fit to JSON and tensors of the folder.
        usual: contents that are nothing unusual for such a file.
    """

    def __init__(self, root: Path, names, *, sign=None, usual=()):
        self.root, self.folder, self.outside = root, root / "artefact", root / OUTSIDE
        if not self.outside.exists():
            shutil.copytree(self.folder, self.outside)
        self.files = {name: (self.folder / name).read_bytes() for name in names}
        self.sign, self.usual = sign, usual

    def strategy(self):
        """A file and its change."""

        def of(name):
            kind = KINDS.get(Path(name).suffix, "text")
            found = changes(
                self.files[name],
                absolute=str(self.outside / Path(name).parent),
                kind=kind,
                signed=self.sign is not None,
            )
            return st.tuples(st.just(name), found.filter(lambda change: change.content not in self.usual))

        return st.sampled_from(sorted(self.files)).flatmap(of)

    @contextlib.contextmanager
    def changed(self, name: str, change: Change):
        """Put a change in a file's place; afterwards everything is as it was."""
        path = self.folder / name
        path.unlink()
        with contextlib.ExitStack() as stack:
            stack.callback(self._restore, path, self.files[name])
            match change.content:
                case bytes():
                    path.write_bytes(change.content)
                case "fifo":
                    os.mkfifo(path)
                    stack.enter_context(pipes_are_left_alone(path))
                case "folder":
                    path.mkdir()
                case "link":
                    path.symlink_to(self.outside / name)
            if change.signed:
                signed = self.sign(self.folder)
                if signed is not None:
                    other, content = signed
                    stack.callback(self._restore, self.folder / other, self.files[other])
                    (self.folder / other).write_bytes(content)
            yield

    @staticmethod
    def _restore(path, content):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def sign_folder(json_name, tensor_name):
    """Make the digest of a Subspace or of statistics fit to what the folder holds now."""

    def sign(folder):
        try:
            description = json.loads((folder / json_name).read_bytes())
            tensors = read_tensors((folder / tensor_name).read_bytes())
            description.pop("digest", None)
            description["digest"] = digest(tensors, description)
        except Exception:  # what cannot be read, or is no such thing any more, cannot be signed
            return None
        return json_name, json.dumps(description).encode()

    return sign


def sign_state(name, entry):
    """Make the digest in a collection's state fit to what the file holds now."""

    def sign(folder):
        try:
            content = (folder / name).read_bytes()
            header, data = parse(content)
            description = json.loads(header["__metadata__"][entry])
            description.pop("digest", None)
            own = {key: value for key, value in description.items() if key not in ("run", "batches")}
            description["digest"] = digest(read_tensors(content), own)
            header["__metadata__"] = {entry: json.dumps(description)}
        except Exception:  # as above
            return None
        return name, build(header, data)

    return sign


@dataclass
class Outcome:
    """What came of the changed files: how many were refused and loaded, and how many errors say nothing."""

    changed: int = 0
    refused: int = 0
    loaded: int = 0
    silent: int = 0


def fuzz(kind: str, artefact: Artefact, load, check, monkeypatch, *, foreign=()) -> Outcome:
    """Change files and load each time: it is refused with one of our errors, or what is loaded is right.

    Args:
        kind: key of `EXAMPLES`.
        artefact: what is changed.
        load: called with the artefact's folder; what it returns is checked.
        check: called with what was loaded, the name of the changed file and the change; raises an AssertionError.
        monkeypatch: the fixture.
        foreign: exceptions of others that may come where their code is reached before ours.
    """
    outcome = Outcome()
    wanted = EXAMPLES[kind] * TIMES
    check(load(artefact.folder), "", Change("none", b""))  # whatever is imported on the way is imported now

    with watched(artefact.folder, artefact.outside, monkeypatch) as watch:

        @settings(
            max_examples=wanted,
            derandomize=SEED is None,
            database=None,
            deadline=None,  # the watch has its own
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(artefact.strategy())
        def run(changed):
            name, change = changed
            outcome.changed += change.content != artefact.files[name]
            with artefact.changed(name, change):
                try:
                    with watch():
                        loaded = load(artefact.folder)
                except PeftSaeError as error:
                    outcome.refused += 1
                    outcome.silent += not str(error).strip()
                    return
                except foreign:
                    outcome.refused += 1
                    return
                outcome.loaded += 1
                check(loaded, name, change)

        if SEED is not None:
            from hypothesis import seed

            run = seed(int(SEED))(run)
        run()
    # Both must come about, or what is checked would be nothing; the few that change nothing make room for them.
    assert outcome.changed >= 0.95 * wanted, outcome
    assert outcome.refused > 0, outcome
    assert outcome.loaded > 0, outcome
    assert not outcome.silent, outcome
    return outcome
