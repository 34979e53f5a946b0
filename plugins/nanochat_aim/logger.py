"""The logger ``aim``: one Aim run, continued when the run is resumed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil
from aim import Repo, Run, Text

from nanochat_aim.config import AimConfig
from nanochat_core import Logger, LoggerContext, lock_file, metrics_and_texts

_LOCK = ".aim_repository.lock"


class Aim(Logger):
    """Logger of metrics and texts under their names, at the step of the record.

    Aim keeps one value per step: a step that is logged again replaces the earlier value. ``aim_run.json`` in the run's
    directory records the Aim run of each repository.
    """

    rewinds: ClassVar[bool] = True

    def __init__(self, config: AimConfig, context: LoggerContext) -> None:
        self.context = context
        self.repo = config.repo or str(context.directory.parents[1])
        if not Repo.is_remote_path(self.repo):
            with lock_file(Path(self.repo) / _LOCK):  # two runs may find that there is none
                if not Repo.exists(self.repo):
                    Repo.from_path(self.repo, init=True)
        record_file = context.directory / "aim_run.json"
        known: dict[str, str] = json.loads(record_file.read_text(encoding="utf-8")) if record_file.exists() else {}
        run: Any = Run(
            known.get(self.repo),
            repo=self.repo,
            experiment=context.project,
            force_resume=self.repo in known,  # the lock may be left from a machine that has crashed
            system_tracking_interval=10 if config.system_metrics and context.live else None,
            capture_terminal_logs=False,
        )
        self.run = run
        if config.system_metrics and context.live:
            with contextlib.suppress(
                Exception
            ):  # metrics of the training process, not of this one; Aim has no option for it
                run._system_resource_tracker._process = psutil.Process(os.getppid())
        record_file.write_text(json.dumps({**known, self.repo: run.hash}) + "\n", encoding="utf-8")
        run.name = f"{context.name} {context.id}"
        seed = context.experiment.get("train", {}).get("seed")
        for tag in {*context.tags, *([] if seed is None else [f"seed-{seed}"])} - set(run.tags):
            run.add_tag(tag)
        run["run"] = {"name": context.name, "id": context.id, "group": context.group, "status": "running"}
        for table, values in context.experiment.items():
            run["experiment", table] = values
        context.report(f"run {run.hash} in {self.repo}; show it with: aim up --repo {self.repo}")

    def log(self, record: Mapping[str, float | str]) -> None:
        step = int(record["step"])
        metrics, texts = metrics_and_texts(record)
        for name, value in metrics.items():
            self.run.track(float(value), name=name, step=step)
        for name, text in texts.items():
            self.run.track(Text(text), name=name, step=step)

    def finish(self, status: Literal["finished", "failed", "preempted"]) -> None:
        self.run["run", "status"] = status
        rows = [("step", "evaluator", "metric", "value"), *self.context.evaluations()]
        if rows[1:]:
            table = "\n".join("\t".join(map(str, row)) for row in rows)
            self.run.track(Text(table), name="evaluations", step=0)
        if status == "finished" and not Repo.is_remote_path(self.repo):
            self.run.report_successful_finish(block=False)
        repo, name = self.run.repo, self.run.hash
        self.run.close()
        if not Repo.is_remote_path(self.repo):
            # Readers use the index; without a web server nothing else would add the run to it.
            # One at a time: two runs that end together would lock each other out of the index.
            with contextlib.suppress(Exception), lock_file(Path(self.repo) / _LOCK):
                from aim.sdk.index_manager import RepoIndexManager

                RepoIndexManager.get_index_manager(repo).index(name)
