"""The bundle: ``core.yaml``, ``eval_meta_data.csv`` and examples, from a directory, a zip, or the network."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import attrs
import yaml
from tqdm import tqdm

from nanochat_core import DataError, lock_file

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
CONFIG, BASELINES = "core.yaml", "eval_meta_data.csv"

TaskType = Literal["multiple_choice", "schema", "language_modeling"]
KEYS: Mapping[str, tuple[str, ...]] = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
CORE_TASKS = (
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa", "commonsense_qa",
    "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande", "bigbench_dyck_languages",
    "agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa",
    "boolq", "bigbench_language_identification",
)  # fmt: skip

# Baselines (percent) that differ between what has been published. "nanochat" is what the figures that are published
# for nanochat's models were centred with, found from them; "dclm-v2" stands in DCLM's eval_meta_data.csv.
VERSIONS: Mapping[str, Mapping[str, float]] = {
    "nanochat": {"commonsense_qa": 20.0, "agi_eval_lsat_ar": 20.0, "bigbench_language_identification": 9.1},
    "dclm-v2": {"commonsense_qa": 40.3, "agi_eval_lsat_ar": 25.0, "bigbench_language_identification": 25.0},
}


@attrs.frozen
class Task:
    """One task of ``core.yaml``.

    Args:
        shots: examples in front of each question.
        delimiter: stands between a question and its answer.
        baseline: accuracy of a guess, in percent.
    """

    label: str
    file: str
    type: TaskType
    shots: int
    delimiter: str
    baseline: float


@attrs.frozen
class Bundle:
    """A bundle whose ``core.yaml`` and baselines have been read.

    Args:
        read: gives the bytes of a file by its path inside the bundle.
        baselines_version: a key of ``VERSIONS``, or "unknown".
        digest: of ``core.yaml`` and the baselines.
    """

    source: str
    read: Callable[[str], bytes]
    tasks: tuple[Task, ...]
    baselines_version: str
    digest: str

    def missing(self) -> list[str]:
        """Tasks of CORE that it hasn't."""
        here = {task.label for task in self.tasks}
        return [label for label in CORE_TASKS if label not in here]

    def examples(self, task: Task) -> tuple[list[dict[str, Any]], str]:
        """The task's examples, and the sha256 of their file.

        Raises:
            DataError: naming file and line of what isn't an example of the task's type.
        """
        name = f"eval_data/{task.file}"
        data = self.read(name)
        found = []
        for number, line in enumerate(data.decode("utf-8").splitlines() if b"\r" in data else _lines(data), start=1):
            if not line.strip():
                continue
            where = f"{self.source}/{name}:{number}"
            try:
                example = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: no JSON ({error}): get the bundle again", key="bundle") from error
            _check_example(task, example, where)
            found.append(example)
        if len(found) <= task.shots:
            message = f"{self.source}/{name}: {len(found)} examples are too few for {task.shots} shots"
            raise DataError(message, key="bundle")
        return found, hashlib.sha256(data).hexdigest()


def _lines(data: bytes) -> list[str]:
    """Not splitlines: it knows ends of lines that JSON doesn't."""
    return data.decode("utf-8").split("\n")


def _check_example(task: Task, example: Any, where: str) -> None:
    keys = KEYS[task.type]
    missing = [key for key in keys if key not in example] if isinstance(example, dict) else keys
    if missing:
        message = f"{where}: a {task.type} example needs {', '.join(keys)}; {', '.join(missing)} is missing"
        raise DataError(message, key="bundle")
    options = example.get("choices" if task.type == "multiple_choice" else "context_options")
    if task.type != "language_modeling" and not (
        isinstance(options, list) and isinstance(example["gold"], int) and 0 <= example["gold"] < len(options)
    ):
        message = f"{where}: gold must be the index of one of {options!r}, not {example['gold']!r}"
        raise DataError(message, key="bundle")


def open_bundle(path: Path | None, cache: Path, url: str = URL) -> Bundle:
    """The bundle at ``path``; without a path the public one.

    Raises:
        DataError: when it can't be read or downloaded, and what to do.
    """
    return _from_path(path if path is not None else download(cache, url))


def _from_path(path: Path) -> Bundle:
    if path.is_dir():
        root = path if (path / CONFIG).is_file() else path / "eval_bundle"
        return _parse(str(root), _file_reader(root))
    if not path.is_file():
        raise DataError(f"{path} is neither a directory nor a zip file", key="bundle")
    try:
        with zipfile.ZipFile(path) as archive:
            found = [name for name in archive.namelist() if name.rpartition("/")[2] == CONFIG]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no readable zip file ({error})", key="bundle") from error
    if not found:
        raise DataError(f"there is no {CONFIG} in {path}", key="bundle")
    return _parse(str(path), _zip_reader(path, min(found, key=len).removesuffix(CONFIG)))


def _file_reader(root: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            return (root / name).read_bytes()
        except OSError as error:
            raise DataError(
                f"{root / name} can't be read ({error.strerror}): give the directory that holds {CONFIG}, or leave "
                f"tasks without data out with the option tasks",
                key="bundle",
            ) from error

    return read


def _zip_reader(path: Path, prefix: str) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.read(prefix + name)
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{prefix + name} in {path} can't be read ({error}): get it again", key="bundle") from error

    return read


def _parse(source: str, read: Callable[[str], bytes]) -> Bundle:
    config, csv_file = read(CONFIG), read(BASELINES)
    baselines = {}
    for row in csv.DictReader(io.StringIO(csv_file.decode("utf-8-sig"))):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            baselines[row["Eval Task"]] = float(row["Random baseline"])
    try:
        entries = yaml.safe_load(config)["icl_tasks"]
        tasks = tuple(_task(entry, baselines) for entry in entries)
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        message = f"{source}/{CONFIG}: {error!r}: it must list icl_tasks with label, dataset_uri, ..."
        raise DataError(message, key="bundle") from error
    digest = hashlib.sha256(config + b"\0" + csv_file).hexdigest()
    return Bundle(source, read, tasks, baselines_version(baselines), digest)


def _task(entry: Mapping[str, Any], baselines: Mapping[str, float]) -> Task:
    label = entry["label"]
    if entry["icl_task_type"] not in get_args(TaskType):
        raise ValueError(f"{label}: icl_task_type {entry['icl_task_type']!r} is none of {', '.join(KEYS)}")
    if label not in baselines:
        raise ValueError(f"{label} has no random baseline in {BASELINES}")
    shots = entry["num_fewshot"]
    return Task(
        label=label,
        file=entry["dataset_uri"],
        type=cast(TaskType, entry["icl_task_type"]),
        shots=int(shots[0] if isinstance(shots, list) else shots),
        delimiter=entry.get("continuation_delimiter", " "),
        baseline=baselines[label],
    )


def baselines_version(baselines: Mapping[str, float]) -> str:
    """Which published set of baselines these are."""
    for name, values in VERSIONS.items():
        if all(baselines.get(label) == value for label, value in values.items()):
            return name
    return "unknown"


# ------------------------------------------------------------------------------------------------------ downloading


def download(cache: Path, url: str = URL) -> Path:
    """The bundle's zip in ``cache``, fetched if it isn't there yet. It appears whole, after each of its files has been
    read and compared with its checksum; of processes that want it at the same time one fetches, the others wait.

    Raises:
        DataError: when it can't be fetched, or arrives damaged.
    """
    target = cache / "eval_bundle.zip"
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with lock_file(cache / "eval_bundle.lock"):
        if target.is_file():
            return target
        partial = cache / f".eval_bundle.{os.getpid()}"
        try:
            _fetch(url, partial)
            _verify(partial, url)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _fetch(url: str, partial: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, partial.open("wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm(desc="evaluation bundle", total=size or None, unit="B", unit_scale=True, disable=None) as bar:
                for piece in iter(lambda: answer.read(1 << 20), b""):
                    file.write(piece)
                    bar.update(len(piece))
            if size and file.tell() != size:
                raise OSError(f"{file.tell():,} of {size:,} bytes arrived")
    except OSError as error:
        raise DataError(
            f"the evaluation bundle can't be fetched from {url} ({error}): run it again, or fetch it elsewhere and set "
            f"this to the zip file or its directory",
            key="bundle",
        ) from error


def _verify(path: Path, url: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        message = f"the evaluation bundle from {url} is no sound zip file ({error}): run it again"
        raise DataError(message, key="bundle") from error
    if damaged is not None:
        raise DataError(f"the evaluation bundle arrived damaged ({damaged}): run it again", key="bundle")
    if not any(name.rpartition("/")[2] == CONFIG for name in names):
        raise DataError(f"what {url} sent has no {CONFIG}: set it to a bundle of your own", key="bundle")
