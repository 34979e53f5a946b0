"""Tracing of a worker's file operations and collectives, and killing it or its job at one event.

Python imports this module at its start if it is on PYTHONPATH. It acts only in workers of ``nanochat run`` whose
environment has ``NANOCHAT_KILLER``, a JSON object:

    directory   for ``trace.RANK`` (one phase per line), ``RANK.pid`` and, written before the event acts, ``struck``
    roots       directories whose files are traced
    rank, phase, nth    the event; without them it only traces
    what        "rank" or "job": what SIGKILL ends; "stop" sends SIGTERM to the launcher, and the worker continues
    cut         part of a file or of written data that gets to the disk, 0 to 1

A phase is the kind of event and its object: ``fsync new step/model.safetensors``, ``all_reduce in a step``.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
from pathlib import Path

if "RANK" in os.environ and "NANOCHAT_KILLER" in os.environ and "nanochat_core" in sys.orig_argv[1:4]:
    import builtins
    import functools
    import shutil
    import signal
    import time

    SPEC = json.loads(os.environ["NANOCHAT_KILLER"])
    RANK, DIRECTORY = int(os.environ["RANK"]), Path(SPEC["directory"])
    ROOTS = tuple(SPEC["roots"])
    TRACE = os.open(DIRECTORY / f"trace.{RANK}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    (DIRECTORY / f"{RANK}.pid").write_text(str(os.getpid()))
    NAMES = [
        (r"\.step_\d+\.deleted\.\d+", "old step"),
        (r"\.step_\d+\.\d+", "new step"),
        (r"step_\d+", "step"),
        (r"\d{8}-\d{6}-\d{6}", "run"),
        (r"[0-9a-f]{16}\.tokens", "tokens"),
        (r"[0-9a-f]{32}\.[0-9a-f]{8}", "new key"),
        (r"\.[0-9a-f]{32}\.json\.\d+(\.[0-9a-f]+)?", "new key.json"),
        (r"[0-9a-f]{32}(.*)", r"key\1"),
        (r"\.(.+?)(\.\d+)?\.[0-9a-f]+", r"new \1"),
        (r"(.*)_\d{6}\.json", r"\1.json"),
    ]
    # functions that call collectives, innermost first
    CALLERS = {
        "evaluate": "an evaluation",
        "settle": "an evaluation",
        "save": "saving",
        "train_step": "a step",
        "finish_saving": "the end",
        "build": "building",
        "prepare": "preparing",
    }
    lock, seen = threading.Lock(), 0
    told = threading.Event()  # this worker has handled a SIGTERM

    def install(number: int, handler: object, _install=signal.signal) -> object:  # type: ignore[no-untyped-def]
        """``signal.signal``, with a SIGTERM noted."""

        def noting(number: int, frame: object) -> None:
            told.set()
            handler(number, frame)  # type: ignore[operator]

        return _install(number, noting if number == signal.SIGTERM and callable(handler) else handler)

    signal.signal = install  # type: ignore[assignment]

    def label(path: str) -> str:
        """The last two parts of a path, with names that differ between runs replaced."""
        parts = Path(path).parts[-2:]
        for pattern, name in NAMES:
            parts = tuple(re.sub(f"^{pattern}$", name, part) for part in parts)
        return "/".join(parts)

    def path_of(descriptor: int) -> str:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())

    def is_ours(path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(ROOTS)

    def strikes(phase: str) -> bool:
        """Record an event. Returns whether it is the event to act at."""
        global seen
        with lock:
            os.write(TRACE, f"{phase}\n".encode())
            if SPEC.get("rank") != RANK or phase != SPEC["phase"]:
                return False
            seen += 1
            return seen == SPEC["nth"]

    def strike() -> None:
        os.close(os.open(DIRECTORY / "struck", os.O_WRONLY | os.O_CREAT))
        if SPEC["what"] == "stop":
            os.kill(os.getppid(), signal.SIGTERM)
            told.wait(60)
            time.sleep(0.2)  # until the launcher has signalled the other workers
            return
        if SPEC["what"] == "job":
            others = [int(file.read_text()) for file in DIRECTORY.glob("*.pid")]
            for pid in (os.getppid(), *(pid for pid in others if pid != os.getpid())):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        os.kill(os.getpid(), signal.SIGKILL)

    def event(phase: str) -> None:
        if strikes(phase):
            strike()

    # -- files

    def audit(name: str, arguments: tuple[object, ...]) -> None:
        if name == "subprocess.Popen" and str(arguments[0]).endswith("g++"):
            event("compile")
        if name not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        path = os.fspath(arguments[1] if name == "os.rename" else arguments[0])  # type: ignore[call-overload]
        descriptor = arguments[-1]
        if isinstance(path, str) and not path.startswith("/") and isinstance(descriptor, int) and descriptor > 0:
            path = f"{path_of(descriptor)}/{path}"
        if is_ours(path):
            event(f"{name[3:]} {label(path)}")

    class File:
        """A file that is opened for writing, of which a killed process leaves a part."""

        def __init__(self, file: io.IOBase, name: str) -> None:
            self._file, self._name = file, name

        def write(self, data: str | bytes) -> int:
            if strikes(f"write {self._name}"):
                self._file.write(data[: int(SPEC["cut"] * len(data))])  # type: ignore[attr-defined]
                self._file.flush()
                strike()
                data = data[int(SPEC["cut"] * len(data)) :]
            return self._file.write(data)  # type: ignore[attr-defined, no-any-return]

        def writelines(self, lines: list[str | bytes]) -> None:
            for line in lines:
                self.write(line)

        def truncate(self, *size: int) -> int:
            event(f"truncate {self._name}")
            return self._file.truncate(*size)

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(self._file)

        def __enter__(self):  # type: ignore[no-untyped-def]
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

    real_open, real_fsync, real_copy = io.open, os.fsync, shutil.copyfile

    @functools.wraps(real_open)
    def traced_open(file, mode="r", *arguments, **options):  # type: ignore[no-untyped-def]
        if not is_ours(file) or not set(mode) & set("wax+"):
            return real_open(file, mode, *arguments, **options)
        return File(real_open(file, mode, *arguments, **options), label(os.fspath(file)))

    def traced_fsync(descriptor: int) -> None:
        path = path_of(descriptor)
        if is_ours(path):
            event(f"fsync {label(path)}")
        real_fsync(descriptor)

    def traced_copy(source, target, **options):  # type: ignore[no-untyped-def]
        if strikes(f"copy {label(os.fspath(target))}"):
            data = Path(source).read_bytes()
            with real_open(target, "wb") as file:
                file.write(data[: int(SPEC["cut"] * len(data))])
            strike()
        return real_copy(source, target, **options)

    sys.addaudithook(audit)
    io.open = builtins.open = traced_open
    os.fsync, shutil.copyfile = traced_fsync, traced_copy  # type: ignore[assignment]

    # -- collectives, and operations that take long

    import safetensors.torch
    import torch.distributed

    real_save = safetensors.torch.save_file

    def traced_save(tensors, filename, **options):  # type: ignore[no-untyped-def]
        doomed = strikes(f"save {label(os.fspath(filename))}")
        real_save(tensors, filename, **options)
        if doomed:
            if SPEC["what"] != "stop":
                os.truncate(filename, int(SPEC["cut"] * Path(filename).stat().st_size))
            strike()

    safetensors.torch.save_file = traced_save

    # these modules import names that are traced above
    import nanochat_bpe.tokenizer
    import nanochat_core.evaluation.evaluate
    import nanochat_core.training.prepare

    def traced(name: str, function, phase=None):  # type: ignore[no-untyped-def]
        @functools.wraps(function)
        def wrapper(*arguments, **options):  # type: ignore[no-untyped-def]
            event(phase(*arguments) if phase else name)
            return function(*arguments, **options)

        return wrapper

    def collective(name: str) -> str:
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_name not in CALLERS:
            frame = frame.f_back  # type: ignore[assignment]
        return f"{name} in {CALLERS[frame.f_code.co_name] if frame else 'between'}"

    for name in (
        "all_reduce", "broadcast", "barrier", "broadcast_object_list", "all_gather_object", "reduce_scatter_single",
        "reduce_scatter_tensor", "all_gather_single", "all_gather_into_tensor",
    ):  # fmt: skip
        if hasattr(torch.distributed, name):
            kind = re.sub("_(into_tensor|tensor|single)$", "", name)  # the names differ between versions of torch
            which = functools.partial(lambda kind, *_: collective(kind), kind)
            setattr(torch.distributed, name, traced(name, getattr(torch.distributed, name), which))
    for name in ("init_process_group", "destroy_process_group"):
        setattr(torch.distributed, name, traced(name, getattr(torch.distributed, name)))

    def traced_documents(*arguments):  # type: ignore[no-untyped-def]
        for text in real_documents(*arguments):
            event("read to train the tokenizer")
            yield text

    real_documents = nanochat_bpe.tokenizer._training_text
    nanochat_bpe.tokenizer._training_text = traced_documents
    nanochat_core.training.prepare.make_plan = traced("plan", nanochat_core.training.prepare.make_plan)
    nanochat_core.evaluation.evaluate.evaluate = traced(
        "evaluate", nanochat_core.evaluation.evaluate.evaluate, lambda choice, *_: f"evaluate {choice.name}"
    )
