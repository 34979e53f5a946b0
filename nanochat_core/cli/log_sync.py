"""``nanochat log-sync RUN --to NAME``: send a logger the records of a run that it has not received."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanochat_core.cli import add_runs_dir, add_trust

if TYPE_CHECKING:
    from nanochat_core.config.schema import Experiment
    from nanochat_core.interfaces.logger import LoggerContext
    from nanochat_core.plugins.choice import Choice
    from nanochat_core.plugins.discovery import Plugins
    from nanochat_core.runs.directory import RunDirectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run: its name (the newest), name/id, id, or directory")
    parser.add_argument(
        "--to", required=True, metavar="NAME", help="a logger of the run's experiment, or any installed logger plugin"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="options",
        help="an option of that logger, as in --set mode=online; may be repeated",
    )
    add_runs_dir(parser)
    add_trust(parser)


def main(options: argparse.Namespace, _: Sequence[str]) -> int:
    from nanochat_core.errors import CheckpointError
    from nanochat_core.plugins.discovery import load_plugins
    from nanochat_core.runs.directory import find_run
    from nanochat_core.runs.ledger import read_ledger
    from nanochat_core.runs.trust import require_trust

    run = find_run(options.run, options.runs_dir)
    if run.is_locked():
        raise CheckpointError(f"{run.path} is being trained, and its loggers receive it: wait until the run has ended")
    experiment, choice = _load(run, load_plugins(), options.to, options.options)
    require_trust(
        run, options.runs_dir, "nanochat log-sync", {f"loggers.{choice.name}": choice}, [run.loggers], options.trust
    )
    if not run.ledger.exists():
        raise CheckpointError(f"{run.path} has no {run.ledger.name}, so there is nothing to send")
    status = run.read_status()
    return _send(choice, _context(run, experiment, status), str(status.get("status")), list(read_ledger(run.ledger)))


def _load(run: RunDirectory, plugins: Plugins, name: str, options: Sequence[str]) -> tuple[Experiment, Choice]:
    """Return the recorded experiment of a run, and logger ``name`` with ``options`` applied to it.

    Raises:
        ConfigError: when the logger or one of its libraries is not installed, or an option is wrong.
        PluginError: when the logger shows a run only while it is trained.
    """
    from nanochat_core.config.load import Tables
    from nanochat_core.errors import ConfigError, PluginError
    from nanochat_core.runs.restore import load_recorded

    experiment = load_recorded(run, plugins).experiment
    is_new = name not in [choice.name for choice in experiment.loggers]
    added = [Tables({"loggers": {name: {"plugin": name}}}, f"--to {name}")] if is_new else []
    loaded = load_recorded(run, plugins, [f"loggers.{name}.{option}" for option in options], added)
    missing = [problem for problem in loaded.missing if f"{problem.key}.".startswith(f"loggers.{name}.")]
    if missing:
        raise ConfigError(missing)
    (choice,) = (choice for choice in loaded.experiment.loggers if choice.name == name)
    if choice.entry is not None and choice.entry.in_process:
        raise PluginError(f"logger {name!r} shows a run while it is trained: nothing can be sent to it afterwards")
    return experiment, choice


def _context(run: RunDirectory, experiment: Experiment, status: Mapping[str, Any]) -> LoggerContext:
    """Return the context of a logger that receives a run after its end."""
    from nanochat_core.config.tables import to_tables
    from nanochat_core.interfaces.logger import LoggerContext

    return LoggerContext(
        directory=run.path.resolve(),
        name=run.name,
        id=run.id,
        project=experiment.run.project,
        group=experiment.run.group,
        tags=experiment.run.tags,
        experiment=to_tables(experiment),
        num_iterations=status.get("num_iterations", 0),
        start_step=status.get("step", 0),
        live=False,
    )


def _send(choice: Choice, context: LoggerContext, status: str, records: Sequence[dict[str, Any]]) -> int:
    """Send the records that the logger has not received. Returns the exit code: 2 if some are still missing.

    Args:
        status: how the run ended, as in its ``status.json``.
        records: all records of the run's ledger.
    """
    from nanochat_core.loggers.process import LoggerProcess
    from nanochat_core.loggers.progress import Job, Progress, progress_file
    from nanochat_core.plugins.choice import LoggerKeys

    def count_missing() -> int:
        progress = Progress.read(progress_file(context.directory, choice.name))
        return sum(not progress.already_told(record) for record in records)

    assert isinstance(choice.keys, LoggerKeys)
    missing_before = count_missing()
    process = LoggerProcess(Job(choice, context, choice.keys.timeout, finish_at_once=False), print)
    try:
        process.end(status if status in ("finished", "preempted") else "failed")
        complete = process.wait(None)
    except KeyboardInterrupt:
        process.kill()
        raise
    missing = count_missing()
    print(f"logger {choice.name}: {missing_before - missing} records sent, {missing} missing, of {len(records)}")
    return 0 if complete else 2
