"""The ``nanochat`` command line: one module per command. This module imports no torch; a command that needs it does."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nanochat_core import __version__
from nanochat_core.errors import NanochatError

# Environment variables that are read when torch is imported. Waiting threads sleep after a short spin (a long spin
# starves the data thread and other runs), and large tensors get huge pages: see benchmarks/train_speed.py. cuBLAS is
# deterministic bit for bit only with a workspace of fixed size, which is the default on Hopper.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    "THP_MEM_ALLOC_ENABLE": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    The codes: 0 for success, 1 when an evaluator or a check of plugins failed, 2 for an error that the user can fix
    (argparse exits with it too), 3 when training diverged, 4 when memory ran out, 75 when a signal stopped the run,
    130 after Ctrl-C. ``run`` with several processes returns the code of the process that failed first.
    """
    parser = argparse.ArgumentParser(
        prog="nanochat",
        description="Train small GPT-style language models end to end from one TOML file. Every part is a plugin.",
        epilog="Start with: nanochat run experiments/quickstart.toml",
    )
    parser.add_argument("--version", action="version", version=f"nanochat {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    arguments = list(sys.argv[1:] if argv is None else argv)
    modules = {name: f"nanochat_core.cli.{name.replace('-', '_')}" for name in COMMANDS}
    known = {**COMMANDS, **_plugin_commands(arguments, modules)}
    for name, summary in known.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in arguments[:1]:  # only the module of the requested command is imported
            importlib.import_module(modules[name]).add_arguments(command)
    options = parser.parse_args(arguments)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        code: int = importlib.import_module(modules[options.command]).main(options, arguments)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_stdout()
        return code
    except NanochatError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of the pipe, such as head, has ended
        _drop_stdout()
        return 0
    except KeyboardInterrupt:
        return 130


def _drop_stdout() -> None:
    """Discard what is still buffered, so that Python does not fail when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    parser.add_argument("file", type=Path, metavar="FILE", help="the experiment file (TOML)")
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
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="directory of all runs (default: runs)"
    )


def positive(text: str) -> int:
    """Convert an argument to a whole number of at least 1; a type for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def above_zero(text: str) -> float:
    """Convert an argument to a finite number greater than 0; a type for argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be greater than 0, not {text}")
    return number
