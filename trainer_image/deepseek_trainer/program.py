"""A forked process becomes the Python program of a command line, as a fresh interpreter would."""

from __future__ import annotations

import builtins
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn


@dataclass(frozen=True, kw_only=True)
class Program:
    """`python -u -m NAME ARGUMENTS` or `python -u NAME ARGUMENTS`."""

    name: str
    is_module: bool
    arguments: tuple[str, ...]

    @property
    def folder(self) -> str:
        """What the interpreter puts in front of sys.path."""
        return str(Path.cwd()) if self.is_module else str(Path(self.name).resolve().parent)


def program_of(command: Sequence[str]) -> Program | None:
    """The program of a worker's command line.

    None for what only a fresh interpreter starts rightly: other interpreters and options, folders,
    archives, and scripts that do not exist.
    """
    if list(command[:2]) != [sys.executable, "-u"] or len(command) < 3:
        return None
    if command[2] == "-m" and len(command) > 3:
        return Program(name=command[3], is_module=True, arguments=tuple(command[4:]))
    script = command[2]
    if not script.endswith(".py") or not Path(script).is_file():
        return None
    return Program(name=script, is_module=False, arguments=tuple(command[3:]))


def shadowed_module(folder: str) -> str:
    """A module that is loaded already, while a fresh interpreter would find another in `folder`.

    Empty if there is none.
    """
    for entry in os.scandir(folder):
        name, _, suffix = entry.name.partition(".")
        loaded = getattr(sys.modules.get(name), "__file__", None)
        # Not Path.exists, which raises for a folder of somebody else's; import finds nothing there.
        package = not suffix and os.path.exists(f"{entry.path}/__init__.py")  # noqa: PTH110
        if loaded and (suffix == "py" or package) and not loaded.startswith(entry.path):
            return name
    return ""


def run(program: Program) -> NoReturn:
    """Run it as `__main__` and exit as it does; to be called on the main thread, with no caller
    that has anything left to do.
    """
    if not sys.flags.safe_path:
        sys.path.insert(0, program.folder)
    sys.argv = [program.name, *program.arguments]
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    try:
        if program.is_module:
            # What `python -m` itself calls: unlike run_module it stays `__main__` to the very end.
            runpy._run_module_as_main(program.name)  # type: ignore[attr-defined]
        else:
            _run_script(program.name, main)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 -- the program's own hook says it
        error.__traceback__ = _own_part(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    sys.exit(0)


def _run_script(path: str, main: ModuleType) -> None:
    loader = SourceFileLoader("__main__", path)
    main.__dict__.update(__file__=path, __cached__=None, __loader__=loader)
    code = compile(Path(path).read_bytes(), path, "exec")
    exec(code, main.__dict__)  # noqa: S102


def _own_part(traceback: TracebackType | None) -> TracebackType | None:
    """The program's: without the frames of this file."""
    while traceback and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    return traceback
