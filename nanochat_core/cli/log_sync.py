"""``nanochat log-sync RUN --to NAME``: tell a logger what it missed of a run that has ended, or all of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nanochat_core.cli import add_runs_dir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run: its name (the newest), name/id, id, or directory")
    parser.add_argument(
        "--to", required=True, metavar="NAME", help="a logger of the run's experiment, or any logger that is installed"
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


def main(options: argparse.Namespace, _: Sequence[str]) -> int:
    from nanochat_core.config.load import Tables
    from nanochat_core.config.tables import to_tables
    from nanochat_core.errors import CheckpointError, ConfigError, PluginError
    from nanochat_core.interfaces.logger import LoggerContext
    from nanochat_core.loggers.process import LoggerProcess
    from nanochat_core.loggers.progress import Job, Progress, progress_file
    from nanochat_core.plugins.choice import LoggerKeys
    from nanochat_core.plugins.discovery import load_plugins
    from nanochat_core.runs.directory import find_run
    from nanochat_core.runs.ledger import read_ledger
    from nanochat_core.runs.restore import load_recorded

    run = find_run(options.run, options.runs_dir)
    status = run.read_status()
    if run.is_locked():
        raise CheckpointError(f"{run.path} is being trained, its loggers follow it: wait until it has ended")
    plugins, name = load_plugins(), options.to
    experiment = load_recorded(run, plugins).experiment
    new = name not in [choice.name for choice in experiment.loggers]
    overrides = [f"loggers.{name}.{option}" for option in options.options]
    added = [Tables({"loggers": {name: {"plugin": name}}}, f"--to {name}")] if new else []
    loaded = load_recorded(run, plugins, overrides, added)
    missing = [problem for problem in loaded.missing if problem.key.startswith(f"loggers.{name}")]
    if missing:
        raise ConfigError(missing)
    (choice,) = (choice for choice in loaded.experiment.loggers if choice.name == name)
    if choice.entry is not None and choice.entry.in_process:
        raise PluginError(f"logger {name!r} shows a run while it is trained, there is nothing to send to it later")
    if not run.ledger.exists():
        raise CheckpointError(f"{run.path} has no ledger: nothing to send")
    assert isinstance(choice.keys, LoggerKeys)
    context = LoggerContext(
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
    progress = progress_file(context.directory, name)
    records = list(read_ledger(run.ledger))

    def missed() -> int:
        told = Progress.read(progress)
        return sum(not told.already_told(record) for record in records)

    before = missed()
    process = LoggerProcess(Job(choice, context, choice.keys.timeout, finish_at_once=False), print)
    try:
        ended = str(status.get("status"))
        process.end(ended if ended in ("finished", "preempted") else "failed")
        complete = process.wait(None)
    except KeyboardInterrupt:
        process.kill()
        raise
    print(f"logger {name}: {before - missed()} records sent, {missed()} missing, of {len(records)}")
    return 0 if complete else 2
