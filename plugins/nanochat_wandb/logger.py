"""The logger ``wandb``. Its backend is a separate process, so ``log`` does not wait for the network."""

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
from nanochat_wandb.check import mode_of_environment
from nanochat_wandb.config import WandbConfig

_PROBE_SECONDS = 5.0
# Settings with which wandb tells nothing about this machine, the working directory and the command.
PRIVATE: Mapping[str, Any] = {
    "disable_code": True,
    "disable_git": True,
    "host": "not shared",
    "x_disable_meta": True,
    "x_save_requirements": False,
}

# Don't share the service of a parent process, such as a sweep's agent: it has other runs and may end earlier.
os.environ.pop("WANDB_SERVICE", None)


class Wandb(Logger):
    """A logger to Weights & Biases. Its run's id consists of the run's name and id, so that a resumed run continues it.

    Every record is a row with its ``step`` as a value, which is the x-axis of all charts. wandb's internal step only
    counts rows: it can't decrease, and an evaluation and a training step of the same number would have to share a row.
    """

    def __init__(self, config: WandbConfig, context: LoggerContext) -> None:
        self.context = context
        self.run: Any = None
        if config.mode == "auto" and mode_of_environment() == "disabled":
            context.report("writes nothing, because WANDB_MODE is disabled")
            return
        online, why = _is_online(config)
        if not online and config.mode == "auto":
            context.report(f"offline, because {why}")
        try:
            self.run = self._init(config, online)
        except Exception as error:
            if config.mode == "online":
                raise
            if not online:
                raise
            context.report(f"offline, because the server does not accept the run: {' '.join(str(error).split())[:200]}")
            wandb.teardown(exit_code=1)  # releases the id of the run that was not accepted
            online = False
            self.run = self._init(config, online)
        self.run.define_metric("*", step_metric="step")
        # One command uploads all parts of a resumed run: wandb appends them in order.
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
        if not context.experiment.get("run", {}).get("share_environment", False):
            settings |= PRIVATE
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
            # With "allow", wandb sync appends this part to the run; otherwise it writes from the run's start, which is
            # right for the first part (some of it may have been uploaded) and would overwrite it later.
            resume="allow" if any((context.directory / "wandb").glob(f"*run-*-{run_id}")) else None,
            settings=wandb.Settings(**known),
        )

    def log(self, record: Mapping[str, float | str]) -> None:
        if self.run is None:
            return
        metrics, texts = metrics_and_texts(record)
        row: dict[str, Any] = {"step": record["step"], "_timestamp": record["time"], **metrics}
        if texts:
            data = [[record["step"], name, text] for name, text in texts.items()]
            row[f"texts/{record.get('evaluator', 'run')}"] = wandb.Table(columns=["step", "name", "text"], data=data)
        self.run.log(row)

    def finish(self, status: Literal["finished", "failed", "preempted"]) -> None:
        if self.run is None:
            return
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
            self.context.report(
                f"the upload did not finish in time; send the rest with: {self.upload} --include-online"
            )


def _is_online(config: WandbConfig) -> tuple[bool, str]:
    """Whether to send records during the run, and the reason if not."""
    if config.mode != "auto":
        return config.mode == "online", "the experiment sets mode"
    mode = os.environ.get("WANDB_MODE", "")
    if mode:
        return mode_of_environment() == "online", f"WANDB_MODE is {mode}"
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
    """Whether a query gets any answer, which may be an error. It runs in a thread, because name resolution can hang."""
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
