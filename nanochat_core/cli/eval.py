"""``nanochat eval RUN|CHECKPOINT|PLUGIN:PATH``: evaluate any model with any evaluator, or ``--compare`` two results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_core.cli import add_runs_dir, add_trust, processes
from nanochat_core.distributed.environment import check_nproc, is_worker
from nanochat_core.errors import CheckpointError, ConfigError, DataError, Problem
from nanochat_core.files import expand_path, shorten

if TYPE_CHECKING:
    from nanochat_core.evaluation.results import Stored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN|CHECKPOINT|PLUGIN:PATH",
        help="a run (its newest checkpoint), the directory of a checkpoint, or a model from elsewhere: the plugin that "
        "loads it, a colon, and the directory or name of the model",
    )
    parser.add_argument(
        "--evaluator",
        action="append",
        default=[],
        metavar="NAME",
        dest="evaluators",
        help="an entry of the experiment or an evaluator plugin; may be repeated (default: all of the experiment)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a value, as in --set train.device_batch_size=8; may be repeated",
    )
    parser.add_argument(
        "--nproc",
        type=processes,
        default=1,
        metavar="N",
        help="number of worker processes, one per device (default: 1)",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="compare two evaluations with paired statistics; A and B are runs or directories under evaluations/",
    )
    parser.add_argument(
        "--allow-other-data",
        action="store_true",
        help="with --compare: compare the two although they were measured on different data",
    )
    add_runs_dir(parser)
    add_trust(parser)


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if (options.target is None) == (options.compare is None):
        raise ConfigError([Problem("", "give either one model to evaluate, or --compare A B", "nanochat eval")])
    if options.compare is not None:
        a, b = options.compare
        return _compare(a, b, options.evaluators, options.runs_dir, options.allow_other_data)
    check_nproc(options.nproc)
    from nanochat_core.evaluation.standalone import check_subject, evaluate_model
    from nanochat_core.plugins.discovery import load_plugins

    what = (options.target, options.evaluators, options.overrides, options.runs_dir, load_plugins(), options.trust)
    if options.nproc > 1 and not is_worker():
        from nanochat_core.distributed.launcher import launch

        check_subject(*what)  # here, since the workers have nobody to ask
        return launch([arguments[0], "--trust", *arguments[1:]], options.nproc)
    return evaluate_model(*what)


def _compare(a: str, b: str, names: Sequence[str], runs_dir: Path, allow_other_data: bool) -> int:
    from nanochat_core.evaluation.comparison import compare, format_comparison, other_data

    before, after = _stored(a, runs_dir), _stored(b, runs_dir)
    common = [name for name in before if name in after and (not names or name in names)]
    if not common:
        raise ConfigError(
            f"{a} and {b} have no evaluator in common: {a} has {', '.join(before) or 'nothing'}, {b} has "
            f"{', '.join(after) or 'nothing'}; evaluate both with the same evaluator"
        )
    for name in common:
        ours, theirs = before[name], after[name]
        others = other_data(ours, theirs)
        if others and not allow_other_data:
            x, y = (stored.facts["data"][others[0]][:12] for stored in (ours, theirs))
            raise DataError(
                f"{name}: A and B were measured on different {others[0]} data (fingerprints {x} and {y}), so their "
                f"difference does not compare the models: evaluate both on the same data (--set data.path=...), leave "
                f"{name} out with --evaluator, or compare them nevertheless with --allow-other-data"
            )
        print(f"{name}\nA: {ours.path}\nB: {theirs.path}\n")
        differences = compare(ours, theirs)
        if differences:
            print(format_comparison(differences))
            seen = {task: len(set(ours.values[task]) ^ set(theirs.values.get(task, {}))) for task in ours.values}
            for task, count in seen.items():
                if count:
                    print(f"{task}: {count} examples are in only one of the two and are left out")
            only = sorted(set(ours.values) ^ set(theirs.values))
            if only:
                print(f"tasks in only one of the two: {', '.join(only)}")
        for metric in ours.metrics:
            if metric in theirs.metrics and not differences:
                x, y = ours.metrics[metric], theirs.metrics[metric]
                print(f"{metric}: {x:.6g} to {y:.6g} ({y - x:+.6g})")
        for split in others:
            print(f"warning: the two were measured on different {split} data")
        for setting in sorted({*ours.settings, *theirs.settings}):
            x, y = ours.own_facts.get(setting), theirs.own_facts.get(setting)
            if x != y:
                print(f"warning: {setting} is {x} in A and {y} in B")
        print()
    return 0


def _stored(reference: str, runs_dir: Path) -> dict[str, Stored]:
    """Return evaluations by entry: the newest of a run (or of the run of a checkpoint), or the one in a directory."""
    from nanochat_core.evaluation.results import FACTS, find_evaluations, read_evaluation
    from nanochat_core.runs.directory import EVALUATIONS, find_run

    try:
        path = expand_path(reference)
    except ValueError as error:
        raise CheckpointError(f"{shorten(reference)} {error}") from None
    if (path / FACTS).is_file():
        stored = read_evaluation(path)
        return {stored.name: stored}
    plugin, colon, rest = reference.partition(":")
    for directory in (path, path / EVALUATIONS, *([runs_dir / plugin / rest / EVALUATIONS] if colon else [])):
        evaluations = find_evaluations(directory) if directory.is_dir() else {}
        if evaluations:
            return evaluations
    evaluations = find_evaluations(find_run(reference, runs_dir).evaluations)
    if not evaluations:
        raise CheckpointError(
            f"{reference} has not been evaluated yet; run: nanochat eval {reference} --evaluator NAME"
        )
    return evaluations
