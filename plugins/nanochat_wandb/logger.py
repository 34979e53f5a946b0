"""Weights & Biases. The backend is a process of its own too, so ``log`` returns before anything is sent."""

from __future__ import annotations

import netrc
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal

import wandb
from nanochat_core import Logger, LoggerContext, metrics_and_texts
from nanochat_wandb.config import WandbConfig

_PROBE_SECONDS = 5.0

# The service of a process that started this one, such as a sweep's agent: sharing it would share its runs and its fate.
os.environ.pop("WANDB_SERVICE", None)


class Wandb(Logger):
    """One run under an id made of the run's name and id, so that a resumed run goes on in it.

    Every record is a row of its own with its ``step`` as a value, the x-axis of all charts. wandb's internal step only
    counts rows: it can't go back, and an evaluation and a training step of the same number would have to share a row.
    """

    def __init__(self, config: WandbConfig, context: LoggerContext) -> None:
        self.context = context
        online, why = _is_online(config)
        if not online and config.mode == "auto":
            context.report(f"offline, because {why}")
        try:
            self.run = self._init(config, online)
        except Exception as error:
            if config.mode == "online":
                raise
            context.report(f"offline, because the server does not accept the run: {' '.join(str(error).split())[:200]}")
            wandb.teardown(exit_code=1)  # the run that was not accepted holds the id
            online = False
            self.run = self._init(config, online)
        self.run.define_metric("*", step_metric="step")
        # All parts of a run that was resumed, in one command: wandb appends them in order.
        self.upload = f"wandb sync {os.path.relpath(context.directory)}/wandb/*run-*-{self.run.id}"
        context.report(
            f"{self.run.url}" if online else f"writes to {os.path.relpath(self.run.dir + '/..')}; upload: {self.upload}"
        )

    def _init(self, config: WandbConfig, online: bool) -> Any:
        context = self.context
        settings: dict[str, Any] = {
            "init_timeout": config.init_timeout,
            "finish_timeout": config.finish_timeout,
            "finish_timeout_raises": True,
            "console": "off",
        }
        if not (config.system_metrics and context.live):
            settings["x_disable_stats"] = True
        else:
            settings["x_stats_pid"] = os.getppid()  # the training process, not this one
        known = {k: v for k, v in settings.items() if k in wandb.Settings.model_fields}
        run_id = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{context.name}-{context.id}")[-100:]
        seed = context.experiment.get("train", {}).get("seed")
        return wandb.init(
            project=context.project,
            entity=config.entity,
            id=run_id,
            name=f"{context.name} {context.id}",
            group=context.group or None,
            tags=[*context.tags, *([] if seed is None else [f"seed-{seed}"])],
            config=dict(context.experiment),
            dir=str(context.directory),
            mode="online" if online else "offline",
            # wandb sync appends a part that says so, and else writes from the run's start: right for the first part, of
            # which some may have been uploaded already; a later one would overwrite the first.
            resume="allow" if any((context.directory / "wandb").glob(f"*run-*-{run_id}")) else None,
            settings=wandb.Settings(**known),
        )

    def log(self, record: Mapping[str, float | str]) -> None:
        metrics, texts = metrics_and_texts(record)
        row: dict[str, Any] = {"step": record["step"], "_timestamp": record["time"], **metrics}
        if texts:
            data = [[record["step"], name, text] for name, text in texts.items()]
            row[f"texts/{record.get('evaluator', 'run')}"] = wandb.Table(columns=["step", "name", "text"], data=data)
        self.run.log(row)

    def finish(self, status: Literal["finished", "failed", "preempted"]) -> None:
        rows = self.context.evaluations()
        if rows:
            table = wandb.Table(columns=["step", "evaluator", "metric", "value"], data=[list(row) for row in rows])
            self.run.log({"step": rows[-1][0], "evaluations": table})
        self.run.summary["status"] = status
        if status == "preempted":
            self.run.mark_preempting()
        try:
            self.run.finish(exit_code=0 if status == "finished" else 1)
        except TimeoutError:
            self.context.report(f"not all was uploaded in time; send the rest with: {self.upload} --include-online")


def _is_online(config: WandbConfig) -> tuple[bool, str]:
    """Whether to send while the run runs, and why not."""
    if config.mode != "auto":
        return config.mode == "online", "the experiment says so"
    wish = os.environ.get("WANDB_MODE", "")
    if wish:
        return wish == "online", f"WANDB_MODE is {wish}"
    url = str(wandb.setup().settings.base_url)
    if not _has_key(url):
        return False, "there is no key (wandb login, or WANDB_API_KEY)"
    if not _answers(f"{url}/graphql", min(_PROBE_SECONDS, config.init_timeout)):
        return False, f"{url} does not answer"
    return True, ""


def _has_key(url: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
        return entries.authenticators(urllib.parse.urlparse(url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(url: str, seconds: float) -> bool:
    """Whether a query gets any answer, an error too. Looking up a name can hang, so a thread does it."""
    answered = threading.Event()

    def ask() -> None:
        try:
            query = urllib.request.Request(url, b'{"query": "{ viewer { id } }"}', {"Content-Type": "application/json"})
            urllib.request.urlopen(query, timeout=seconds).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
