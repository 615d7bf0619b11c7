"""What must not happen while a stranger's file is read: running, unpickling, reading elsewhere, waiting."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import safetensors
import safetensors.torch

_FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "socket.connect", "os.exec", "os.posix_spawn")
_SECONDS = 20  # for one load; the slowest takes one
_MEMORY = 2**29  # bytes that all loads together may add; the files have some kilobytes


class BrokenRule(BaseException):
    """No ordinary exception, so that nothing in between takes it for one that it knows."""


class _Watch:
    def __init__(self):
        self.inside = self.outside = None
        self.broken = []

    def hook(self, event, arguments):
        if self.inside is None:
            return
        if event in _FORBIDDEN:
            self._break(f"{event} {arguments!r:.200}")
        elif event == "exec" and self._within(getattr(arguments[0], "co_filename", ""), self.inside):
            self._break(f"code of the artefact was run: {arguments[0].co_filename}")
        elif event == "open":
            self.opened(arguments[0])

    def opened(self, path):
        named = self.inside is not None and isinstance(path, (str, bytes, os.PathLike))
        if named and self._within(os.fsdecode(path), self.outside):
            self._break(f"opened {path!r}, which is no part of the artefact")

    def _within(self, path, folder):
        return isinstance(path, str) and folder is not None and os.path.realpath(path).startswith(str(folder) + os.sep)

    def _break(self, what):
        self.broken.append(what)
        raise BrokenRule(what)


_watch = _Watch()
_installed = []


def _install():
    """Audit hooks stay for good, so there is one, which sleeps between loads."""
    if not _installed:
        sys.addaudithook(_watch.hook)
        _installed.append(True)


@contextlib.contextmanager
def _safetensors_seen(monkeypatch):
    """The library opens files in Rust, which no audit hook sees."""
    original = safetensors.safe_open

    def safe_open(filename, *args, **kwargs):
        _watch.opened(filename)
        return original(filename, *args, **kwargs)

    with monkeypatch.context() as patch:
        for module in (safetensors, safetensors.torch, *_importers(original)):
            patch.setattr(module, "safe_open", safe_open)
        yield


def _importers(original):
    return [module for module in list(sys.modules.values()) if vars(module).get("safe_open") is original]


@contextlib.contextmanager
def pipes_are_left_alone(path: Path):
    """Let go whoever waits for a named pipe, and raise an error about it."""
    waited, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # fails unless there is a reader
                waited.append(path)
            time.sleep(0.002)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if waited:
        raise BrokenRule(f"waited for the pipe {path}")


@contextlib.contextmanager
def watched(inside: Path, outside: Path, monkeypatch):
    """Yield a context manager for single loads.

    Args:
        inside: the artefact's folder, whose code must not run.
        outside: a folder that must not be read.
        monkeypatch: the fixture.
    """
    _install()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def too_long(*_):
        raise BrokenRule(f"longer than {_SECONDS} seconds")

    @contextlib.contextmanager
    def load():
        _watch.inside, _watch.outside = os.path.realpath(inside), os.path.realpath(outside)
        _watch.broken = []
        signal.setitimer(signal.ITIMER_REAL, _SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            _watch.inside = None
        if _watch.broken:  # somebody has swallowed it
            raise BrokenRule(_watch.broken[0])

    old = signal.signal(signal.SIGALRM, too_long)
    try:
        with _safetensors_seen(monkeypatch):
            yield load
    finally:
        signal.signal(signal.SIGALRM, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < _MEMORY, f"{grown / 1e6:.0f} MB more"
