"""The ``nanochat`` command line: one module per command. This module imports no torch; a command that needs it does."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from nanochat_core import __version__
from nanochat_core.cli.streams import drop_output, finish_output, prepare_streams
from nanochat_core.distributed.signals import Interrupted, interruptible_command
from nanochat_core.errors import NanochatError, PassesPlugins, Problem
from nanochat_core.files import expand_path, shorten

# Environment variables that are read when torch is imported. Waiting threads sleep after a short spin (a long spin
# starves the data thread and other runs), and large tensors get huge pages: see benchmarks/train_speed.py. cuBLAS is
# deterministic bit for bit only with a workspace of fixed size, which is the default on Hopper.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    "THP_MEM_ALLOC_ENABLE": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}

UNWRITTEN = 2  # exit code of a command whose output could not be written

COMMANDS = {
    "run": "train an experiment",
    "show": "print every resolved value and where it came from",
    "plan": "estimate what a run will cost, without training",
    "data": "download the data of a source (data download), or describe them (data info)",
    "plugins": "list installed plugins, describe the options of one, or create a plugin package",
    "runs": "list runs with their status and best result",
    "log-sync": "send the records of a run to a logger that has not received all of them",
    "tokenizer": "train a tokenizer, show the tokens of a text, or compare tokenizers",
    "sample": "continue texts with a trained model",
    "eval": "evaluate a trained model, or compare two evaluations",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors repeat an argument without its control characters, and not all of a long one."""

    def error(self, message: str) -> NoReturn:
        super().error(str(Problem("", message)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    The codes: 0 for success, 1 when an evaluator or a check of plugins failed, 2 for an error that the user can fix
    (argparse exits with it too), 3 when training diverged, 4 when memory ran out, 5 when the directory of a run was
    moved, replaced or deleted while it trained, 6 when the last step of a run could not be saved, 75 when a signal
    stopped the run, 130 after Ctrl-C. ``run`` with several processes returns the code of the process that failed first.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    prepare_streams(goes_on=_goes_on(arguments))
    with interruptible_command():
        return _main(arguments)


def _goes_on(arguments: list[str]) -> bool:
    """Whether the command does its work also when its output is lost: its results are on disk."""
    return arguments[:1] in (["run"], ["eval"])


def _main(arguments: list[str]) -> int:
    parser = _Parser(
        prog="nanochat",
        description="Train small GPT-style language models end to end from one TOML file. Every part is a plugin.",
        epilog="Start with: nanochat run experiments/quickstart.toml",
    )
    parser.add_argument("--version", action="version", version=f"nanochat {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {name: f"nanochat_core.cli.{name.replace('-', '_')}" for name in COMMANDS}
    try:
        known = {**COMMANDS, **_plugin_commands(arguments, modules)}
        for name, summary in known.items():
            text = summary.replace("%", "%%")  # argparse formats it
            command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
            if name in arguments[:1]:  # only the module of the requested command is imported
                with _command(name, modules):
                    importlib.import_module(modules[name]).add_arguments(command)
        options = parser.parse_args(arguments)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with _command(options.command, modules):
            code = importlib.import_module(modules[options.command]).main(options, arguments)
            if code is not None and (isinstance(code, bool) or not isinstance(code, int)):
                raise TypeError(f"main() must return an exit code, not {shorten(code)}")
        if finish_output() and not code and not _goes_on(arguments):
            return UNWRITTEN
        return code or 0
    except NanochatError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of the pipe, such as head, has ended
        drop_output()
        return 0
    except Interrupted:
        return 130
    except _Exit as ended:
        return ended.code
    except BaseException as error:
        from nanochat_core.plugins.calls import blame

        failure = blame(error)
        if failure is None and isinstance(error, KeyboardInterrupt):
            return 130
        if failure is None:
            raise
        print(failure, file=sys.stderr)
        return failure.exit_code


class _Exit(PassesPlugins, Exception):
    """The command of a plugin has called ``sys.exit`` with an exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


@contextlib.contextmanager
def _command(name: str, modules: Mapping[str, str]) -> Iterator[None]:
    """A context for code of a command: what a plugin's command raises is the plugin's failure, but it may exit."""
    if name in COMMANDS:
        yield
        return
    from nanochat_core.plugins.calls import plugin_call

    with plugin_call(f"command {name!r} of a plugin ({modules[name]}) failed"):
        try:
            yield
        except SystemExit as ended:
            if ended.code is not None and not isinstance(ended.code, int):
                raise
            raise _Exit(ended.code or 0) from ended


def _plugin_commands(arguments: Sequence[str], modules: dict[str, str]) -> dict[str, str]:
    """Return the summaries, by name, of commands that plugins add, and put their modules into ``modules``.

    Plugins are loaded only if the command line does not begin with one of nanochat's own commands.
    """
    if not arguments or arguments[0] in modules or arguments[0] == "--version":
        return {}
    from nanochat_core.plugins.discovery import load_plugins

    plugins = load_plugins()
    for failure in plugins.failures:
        print(failure, file=sys.stderr)
    summaries = {}
    for command in plugins.commands:
        if command.name in modules:
            owner = f"{command.distribution} (plugin {command.plugin!r})"
            print(
                f"command {command.name!r} of {owner} is left out: nanochat has a command of that name", file=sys.stderr
            )
        else:
            modules[command.name], summaries[command.name] = command.module, command.summary
    return summaries


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that reads an experiment: FILE and ``--set``."""
    parser.add_argument("file", type=path_argument, metavar="FILE", help="the experiment file (TOML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a value, as in --set model.depth=12 --set evaluators.NAME.every=50; may be repeated",
    )


def add_runs_dir(parser: argparse.ArgumentParser) -> None:
    """Add ``--runs-dir``."""
    parser.add_argument(
        "--runs-dir",
        type=path_argument,
        default=Path("runs"),
        metavar="DIR",
        help="directory of all runs (default: runs)",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust``, for commands that do what the files of a run say."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="do what the files of a run say that is not under --runs-dir, without asking",
    )


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return a type for argparse: a whole number in [least, most]."""

    def convert(text: str) -> int:
        number = int(text) if re.fullmatch(r"\s*[-+]?[0-9]{1,20}\s*", text, re.ASCII) else None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least:,} to {most:,}, not {shorten(text)}")
        return number

    return convert


positive = whole(1, 10**12)
processes = whole(1, 4096)
seed = whole(0, 2**63 - 1)


def above_zero(text: str) -> float:
    """Convert an argument to a finite number greater than 0; a type for argparse."""
    number = not_negative(text)
    if not number:
        raise argparse.ArgumentTypeError(f"must be greater than 0, not {shorten(text)}")
    return number


def not_negative(text: str) -> float:
    """Convert an argument to a number of at least 0, up to 10^30; a type for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1e30:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {shorten(text)}")
    return number


def path_argument(text: str) -> Path:
    """Check an argument that is the path of a file or directory; a type for argparse."""
    try:
        expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shorten(text)} {error}") from None
    return Path(text)
