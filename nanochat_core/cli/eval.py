"""``nanochat eval RUN|CHECKPOINT|PLUGIN:PATH``: any evaluator on any model; ``--compare`` two evaluations."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_core.cli import add_runs_dir, positive
from nanochat_core.errors import CheckpointError, ConfigError, DataError, Problem

if TYPE_CHECKING:
    from nanochat_core.evaluation.results import Stored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", nargs="?", metavar="RUN|CHECKPOINT|PLUGIN:PATH",
        help="a run (its newest checkpoint), a checkpoint's directory, or a model from elsewhere: the plugin that "
        "loads it, a colon, and the model's directory or name",
    )  # fmt: skip
    parser.add_argument(
        "--evaluator", action="append", default=[], metavar="NAME", dest="evaluators",
        help="an entry of the experiment or an evaluator plugin; may be repeated (default: all of the experiment)",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a value, as in --set train.device_batch_size=8; may be repeated",
    )  # fmt: skip
    parser.add_argument("--nproc", type=positive, default=1, metavar="N", help="worker processes, one a device")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"),
        help="show the difference of two evaluations with paired statistics: runs, or directories under evaluations/",
    )  # fmt: skip
    parser.add_argument(
        "--allow-other-data", action="store_true",
        help="with --compare: show the difference although the two were measured on other data",
    )  # fmt: skip
    add_runs_dir(parser)


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if (options.target is None) == (options.compare is None):
        raise ConfigError([Problem("", "give either one model to evaluate, or --compare A B", "nanochat eval")])
    if options.compare is not None:
        a, b = options.compare
        return _compare(a, b, options.evaluators, options.runs_dir, options.allow_other_data)
    if options.nproc > 1 and "WORLD_SIZE" not in os.environ:
        from nanochat_core.distributed.launcher import launch

        return launch(arguments, options.nproc)
    from nanochat_core.evaluation.standalone import evaluate_model
    from nanochat_core.plugins.discovery import load_plugins

    return evaluate_model(options.target, options.evaluators, options.overrides, options.runs_dir, load_plugins())


def _compare(a: str, b: str, names: Sequence[str], runs_dir: Path, allow_other_data: bool) -> int:
    from nanochat_core.evaluation.comparison import compare, format_comparison, other_data

    before, after = _stored(a, runs_dir), _stored(b, runs_dir)
    common = [name for name in before if name in after and (not names or name in names)]
    if not common:
        raise ConfigError(
            f"there is nothing to compare: {a} has {', '.join(before) or 'nothing'}, {b} has "
            f"{', '.join(after) or 'nothing'}; evaluate both with the same evaluator"
        )
    for name in common:
        ours, theirs = before[name], after[name]
        others = other_data(ours, theirs)
        if others and not allow_other_data:
            x, y = (stored.facts["data"][others[0]][:12] for stored in (ours, theirs))
            raise DataError(
                f"{name}: A and B were measured on other {others[0]} data (fingerprint {x} and {y}), so that their "
                f"difference says nothing of the models: evaluate both on the same (--set data.path=...), leave {name} "
                f"out with --evaluator, or compare all the same: --allow-other-data"
            )
        print(f"{name}\nA: {ours.path}\nB: {theirs.path}\n")
        differences = compare(ours, theirs)
        if differences:
            print(format_comparison(differences))
            seen = {task: len(set(ours.values[task]) ^ set(theirs.values.get(task, {}))) for task in ours.values}
            for task, count in seen.items():
                if count:
                    print(f"{task}: {count} examples are in one of them only, and are left out")
            only = sorted(set(ours.values) ^ set(theirs.values))
            if only:
                print(f"in one of them only: {', '.join(only)}")
        for metric in ours.metrics:
            if metric in theirs.metrics and not differences:
                x, y = ours.metrics[metric], theirs.metrics[metric]
                print(f"{metric}: {x:.6g} to {y:.6g} ({y - x:+.6g})")
        for split in others:
            print(f"careful: they were measured on other {split} data")
        for setting in sorted({*ours.settings, *theirs.settings}):
            x, y = ours.own_facts.get(setting), theirs.own_facts.get(setting)
            if x != y:
                print(f"careful: {setting} is {x} in A and {y} in B")
        print()
    return 0


def _stored(reference: str, runs_dir: Path) -> dict[str, Stored]:
    """Evaluations by entry: of a run or of a checkpoint's run the newest, or one directory."""
    from nanochat_core.evaluation.results import FACTS, find_evaluations, read_evaluation
    from nanochat_core.runs.directory import EVALUATIONS, find_run

    path = Path(reference)
    if (path / FACTS).is_file():
        found = read_evaluation(path)
        return {found.name: found}
    plugin, colon, rest = reference.partition(":")
    for directory in (path, path / EVALUATIONS, *([runs_dir / plugin / rest / EVALUATIONS] if colon else [])):
        evaluations = find_evaluations(directory) if directory.is_dir() else {}
        if evaluations:
            return evaluations
    evaluations = find_evaluations(find_run(reference, runs_dir).evaluations)
    if not evaluations:
        raise CheckpointError(f"{reference} has not been evaluated yet: nanochat eval {reference} --evaluator NAME")
    return evaluations
