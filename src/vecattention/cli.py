"""The command line: `vecattention COMMAND ...`. A command's module is imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Protocol, cast

COMMANDS = {
    "demo": "answer questions about a film with full and with vector-sparse attention, and compare",
    "env": "versions, the GPU, the processor, and which backends run here",
    "explain": "which backend would run a problem, and why not the others",
    "bench": "time attention and selection",
    "eval": "measure how faithful sparse attention is",
    "sweep": "measure over a range of settings",
    "tune": "find thresholds for a model",
    "metrics": "compare videos",
    "report": "tables and pictures from records",
}
"""Every command and what it does. One whose module is not there yet is not offered."""

INTERRUPTED = 130
WRONG = 2


class Command(Protocol):
    """What a module of `vecattention.commands` offers.

    Attributes:
        __doc__: what the command does; the first paragraph is shown by --help.
        EXAMPLE: a command line that runs, shown at the end of --help.
    """

    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


def available() -> dict[str, str]:
    """The commands whose modules exist, and what each does."""
    return {name: what for name, what in COMMANDS.items() if importlib.util.find_spec(_module(name)) is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code.

    0: done; 1: done, and what was asked for did not hold; 2: wrong input, with one line on stderr; 130: interrupted.

    Args:
        arguments: what follows the program's name; None: those of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in given if not word.startswith("-")), None)
    command = _load(name) if name in available() else None
    args = _parser(name, command).parse_args(given)
    if command is None:
        _parser(None, None).print_help()
        return WRONG
    try:
        return command.run(args)
    except KeyboardInterrupt:
        _complain(name, "interrupted")
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args.traceback:
            raise
        _complain(name, _line(error))
        return WRONG


def _parser(name: str | None, command: Command | None) -> argparse.ArgumentParser:
    """The parser; only the command that was asked for is filled in."""
    from vecattention import __version__

    parser = argparse.ArgumentParser(
        prog="vecattention",
        description="Vector-sparse attention for video transformers.",
        epilog="vecattention COMMAND --help tells more. Example: vecattention env",
    )
    parser.add_argument("--version", action="version", version=f"vecattention {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from, in full")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for each, what in available().items():
        if each != name or command is None:
            commands.add_parser(each, help=what)
            continue
        child = commands.add_parser(
            each,
            help=what,
            description=_first_paragraph(command.__doc__ or what),
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=_Help,
        )
        command.add_arguments(child)
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def _load(name: str | None) -> Command:
    return cast(Command, importlib.import_module(_module(str(name))))


def _module(name: str) -> str:
    return f"vecattention.commands.{name}"


def _first_paragraph(text: str) -> str:
    return text.strip().split("\n\n")[0]


def _line(error: Exception) -> str:
    """One line that says what is wrong and, for a missing package, what to do."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package and package != "vecattention":
        return f"this needs the package {package!r}, which is not installed; pip install 'vecattention[demo]'"
    return " ".join(str(error).split()) or type(error).__name__


def _complain(name: str | None, text: str) -> None:
    sys.stderr.write(f"vecattention {name}: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
