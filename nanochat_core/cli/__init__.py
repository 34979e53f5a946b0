"""The ``nanochat`` command: one module a command. Nothing here imports torch; a command does when it needs it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nanochat_core import __version__
from nanochat_core.errors import NanochatError

# Read when torch is imported. Threads that wait sleep after a short spin (ones that spin for long starve the data
# thread and other runs), and large tensors get huge pages: see benchmarks/train_speed.py. cuBLAS repeats bit for bit
# only with a workspace of its own, which Hopper has anyway.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    "THP_MEM_ALLOC_ENABLE": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}

COMMANDS = {
    "run": "train an experiment",
    "show": "print every resolved value and where it came from",
    "plan": "say what a run will cost, without running it",
    "data": "bring data here (data download), or say what they hold (data info)",
    "plugins": "list what is installed, or explain one plugin's options",
    "runs": "list runs",
    "log-sync": "send a logger what it missed of a run, or a whole run it never had",
    "tokenizer": "make a tokenizer, show the tokens of a text, compare tokenizers",
    "sample": "continue a text with a trained model",
    "eval": "evaluate a trained model, or compare two evaluations",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 2 for what a user has to mend, 3 diverged, 75 stopped by a signal."""
    parser = argparse.ArgumentParser(
        prog="nanochat",
        description="Train small GPT-style language models end to end from one TOML file; every part a plugin.",
        epilog="Start with: nanochat run experiments/quickstart.toml",
    )
    parser.add_argument("--version", action="version", version=f"nanochat {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    arguments = list(sys.argv[1:] if argv is None else argv)
    modules = {name: f"nanochat_core.cli.{name.replace('-', '_')}" for name in COMMANDS}
    known = {**COMMANDS, **_plugin_commands(arguments, modules)}
    for name, summary in known.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in arguments[:1]:  # only the command that is asked for is imported
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
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        _drop_stdout()
        return 0
    except KeyboardInterrupt:
        return 130


def _drop_stdout() -> None:
    """What is left to print goes nowhere, so that Python does not fail over it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _plugin_commands(arguments: Sequence[str], modules: dict[str, str]) -> dict[str, str]:
    """Summaries of commands that plugins add; their modules are put in. Plugins are loaded only when it matters."""
    if not arguments or arguments[0] in modules or arguments[0] == "--version":
        return {}
    from nanochat_core.plugins.discovery import load_plugins

    plugins = load_plugins()
    for failure in plugins.failures:
        print(failure, file=sys.stderr)
    found = {}
    for command in plugins.commands:
        if command.name in modules:
            owner = f"{command.distribution} (plugin {command.plugin!r})"
            print(f"command {command.name!r} of {owner} is left out: nanochat has one of that name", file=sys.stderr)
        else:
            modules[command.name], found[command.name] = command.module, command.summary
    return found


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that reads an experiment."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the experiment, a TOML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a value, as in --set model.depth=12 --set evaluators.NAME.every=50; may be repeated",
    )


def add_runs_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="where run directories are (default: runs)"
    )


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def above_zero(text: str) -> float:
    """argparse type: a finite number greater than 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be greater than 0, not {text}")
    return number
