"""The command `run`: other people's training scripts, with the type registered."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Annotated
from zipfile import is_zipfile

import typer

from ..errors import ConfigError, suggest

_INTERRUPTED = 130  # what shells give a program that SIGINT has ended


def run(
    arguments: Annotated[
        list[str], typer.Argument(metavar="SCRIPT [ARGUMENT]...", help="Script, or -m MODULE, and what belongs to it.")
    ],
) -> None:
    """Run a training script as Python would, with the type SAE_SUBSPACE registered.

    The script is not changed and knows nothing of this package: set `peft_type` and `subspace` in the configuration
    file that it reads. Everything after its name is its own. `python -m peft_sae SCRIPT` does the same, so it also
    works under `accelerate launch -m peft_sae SCRIPT`. peft, transformers and torch are imported before the script
    begins, so what they read from the environment must be set outside of it.

    Example: `peft-sae run my_sft.py --config my_job.yaml`
    """
    run_script(arguments)


def with_command(arguments: Sequence[str], commands: Collection[str]) -> list[str]:
    """Return the arguments of `python -m peft_sae` with `run` in front where they begin with a script.

    The name of a command wins. A file of that name is meant if it is given as `./name` or ends in `.py`.

    Args:
        arguments: those behind the name of the program.
        commands: names of the commands.

    Raises:
        ConfigError: they begin with neither a command nor a file.
    """
    first = arguments[0] if arguments else "--help"
    if first.startswith("-m"):
        return ["run", *arguments]
    if first.startswith("-") or first in commands:
        return list(arguments)
    if not Path(first).exists():
        hint = suggest(first, commands) or f" The commands are {', '.join(sorted(commands))}."
        raise ConfigError(
            f"{first!r} is neither a command nor a file that is there, so there is nothing to run.{hint} Check the "
            "path of the script."
        )
    return ["run", *arguments]


def run_script(arguments: Sequence[str]) -> None:
    """Run a script or a module as `__main__`; its exit code, its errors and its tracebacks are its own.

    Args:
        arguments: `SCRIPT ARGUMENT...` or `-m MODULE ARGUMENT...`.

    Raises:
        ConfigError: there is no such script or module.
        SystemExit: the script ends with it, or with an error, which has been printed then.
    """
    module, rest = _module_of(arguments)
    if module is None:
        script = Path(rest[0])
        if not script.exists():
            raise ConfigError(f"The script '{script}' does not exist, so there is nothing to run. Check the path.")
        sys.argv = list(rest)
        _set_first_path(str(script.resolve().parent) if script.is_file() else None)
    else:
        sys.argv = [module, *rest]
        _set_first_path(os.getcwd())
        _check_module(module)
    try:
        if module is not None:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        elif is_zipfile(rest[0]) or not Path(rest[0]).is_file():
            runpy.run_path(rest[0], run_name="__main__")
        else:
            _run_file(os.path.abspath(rest[0]))
    except (Exception, KeyboardInterrupt) as error:
        error = error.with_traceback(_beyond_this_file(error.__traceback__))
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(_INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)


def _run_file(path: str) -> None:
    """Run a source file as `__main__`, with the absolute path that Python gives it.

    `runpy.run_path` would write that path over the script's own name in `sys.argv`.
    """
    main = ModuleType("__main__")
    main.__file__ = path
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _module_of(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    first = arguments[0]
    if not first.startswith("-"):
        return None, list(arguments)
    if first == "-m" and len(arguments) > 1:
        return arguments[1], list(arguments[2:])
    if first.startswith("-m") and len(first) > 2:
        return first[2:], list(arguments[1:])
    raise ConfigError(f"{first!r} names no script. Give SCRIPT or -m MODULE first, and then what belongs to it.")


def _check_module(module: str) -> None:
    from importlib.util import find_spec

    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ConfigError(f"No module named {module!r} is installed or lies here, so there is nothing to run.")


def _set_first_path(place: str | None) -> None:
    """Put the script's folder where Python has put that of this program."""
    if sys.flags.safe_path:
        return
    del sys.path[:1]
    if place is not None:  # a folder or an archive is put there by runpy
        sys.path.insert(0, place)


def _beyond_this_file(traceback: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that Python would show without this program."""
    own = {__file__, runpy.__file__, "<frozen runpy>"}
    place = traceback
    while place is not None and place.tb_frame.f_code.co_filename in own:
        place = place.tb_next
    return place  # none of the script's: it could not be read
