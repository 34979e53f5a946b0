"""The evaluation bundle: ``core.yaml``, ``eval_meta_data.csv`` and examples, from a directory, a zip or the network."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import http.client
import io
import lzma
import os
import re
import struct
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import attrs
import yaml
from tqdm import tqdm

from nanochat_core import DataError, json_lines, lock_file, name_problem, parse_text, read_regular, shorten

LARGEST_FILE = 2**28  # bytes of a file in a bundle
# NotImplementedError and RuntimeError: methods of compression that zipfile does not know, and passwords.
ZIP_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError,
              RuntimeError, struct.error)  # fmt: skip
LARGEST_CONFIG = 2**20
MOST_SHOTS = 1000
URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
LARGEST, LARGEST_UNPACKED = 1 << 30, 1 << 33  # bytes, far more than the public bundle has
CONFIG, BASELINES = "core.yaml", "eval_meta_data.csv"

TaskType = Literal["multiple_choice", "schema", "language_modeling"]
KEYS: Mapping[str, tuple[str, ...]] = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
LISTS = frozenset(("choices", "context_options"))
CORE_TASKS = (
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa", "commonsense_qa",
    "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande", "bigbench_dyck_languages",
    "agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa",
    "boolq", "bigbench_language_identification",
)  # fmt: skip

# Baselines (percent) that differ between published versions. "nanochat" centered the published figures of nanochat's
# models, from which its values were computed; "dclm-v2" is in DCLM's eval_meta_data.csv.
VERSIONS: Mapping[str, Mapping[str, float]] = {
    "nanochat": {"commonsense_qa": 20.0, "agi_eval_lsat_ar": 20.0, "bigbench_language_identification": 9.1},
    "dclm-v2": {"commonsense_qa": 40.3, "agi_eval_lsat_ar": 25.0, "bigbench_language_identification": 25.0},
}


@attrs.frozen
class Task:
    """One task of ``core.yaml``.

    Args:
        label: name of the task.
        file: path of its examples in ``eval_data/``.
        type: kind of its questions.
        shots: number of solved examples in front of each question.
        delimiter: text between a question and its answer.
        baseline: accuracy of guessing, in percent.
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
        source: its directory or zip file, for messages.
        read: returns the bytes of a file by its path inside the bundle.
        tasks: in the order of ``core.yaml``.
        baselines_version: a key of ``VERSIONS``, or "unknown".
        digest: sha256 of ``core.yaml`` and the baselines.
    """

    source: str
    read: Callable[[str], bytes]
    tasks: tuple[Task, ...]
    baselines_version: str
    digest: str

    def missing(self) -> list[str]:
        """Labels of the tasks of CORE that are not in the bundle."""
        here = {task.label for task in self.tasks}
        return [label for label in CORE_TASKS if label not in here]

    def examples(self, task: Task) -> tuple[list[dict[str, Any]], str]:
        """The task's examples, and the sha256 of their file.

        Raises:
            DataError: when a line isn't an example of the task's type, naming file and line; when there are too few.
        """
        name = f"eval_data/{task.file}"
        data = self.read(name)
        examples = []
        where = f"{self.source}/{name}"
        try:
            for number, example in json_lines(io.BytesIO(data), name):
                _check_example(task, example, f"{where}:{number}")
                examples.append(example)
        except ValueError as error:
            raise DataError(f"{where}: {error}: get the bundle again", key="bundle") from error
        if len(examples) <= task.shots:
            message = f"{self.source}/{name}: {len(examples)} examples are too few for {task.shots} shots"
            message += ": get the bundle again"
            raise DataError(message, key="bundle")
        return examples, hashlib.sha256(data).hexdigest()


def _check_example(task: Task, example: Any, where: str) -> None:
    def refuse(what: str) -> None:
        raise DataError(f"{where}: {what}: correct the line, or get the bundle again", key="bundle")

    keys = KEYS[task.type]
    missing = [key for key in keys if key not in example] if isinstance(example, dict) else keys
    if missing:
        refuse(f"a {task.type} example needs {', '.join(keys)}; {', '.join(missing)} is missing")
    texts = {key: example[key] for key in keys if key not in LISTS and key != "gold"}
    for key in LISTS.intersection(keys):
        if not isinstance(example[key], list) or not example[key]:
            refuse(f"{key} must be a list of texts, not {shorten(example[key])}")
        texts |= {f"{key}[{i}]": text for i, text in enumerate(example[key])}
        gold = example["gold"]
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(example[key]):
            refuse(f"gold must be the index of one of {len(example[key])} {key}, not {shorten(gold)}")
    for key, text in texts.items():
        if not isinstance(text, str):
            refuse(f"{key} must be a text, not {shorten(text)}")


def open_bundle(path: Path | None, cache: Path, url: str = URL) -> Bundle:
    """Open the bundle at ``path``, or the public one when ``path`` is None.

    Args:
        path: a directory or a zip file.
        cache: directory of the public bundle, which is downloaded once.
        url: address of the public bundle.

    Raises:
        DataError: when it can't be read or downloaded.
    """
    return _from_path(path if path is not None else download(cache, url))


def _from_path(path: Path) -> Bundle:
    if path.is_dir():
        root = path if (path / CONFIG).is_file() else path / "eval_bundle"
        return _parse(str(root), _file_reader(root))
    if not path.is_file():
        raise DataError(f"{path} is neither a directory nor a zip file: set it to one of them", key="bundle")
    try:
        with zipfile.ZipFile(path) as archive:
            configs = [name for name in archive.namelist() if name.rpartition("/")[2] == CONFIG]
    except ZIP_ERRORS as error:
        raise DataError(f"{path} is not a readable zip file ({error}): get it again", key="bundle") from error
    if not configs:
        raise DataError(f"there is no {CONFIG} in {path}: set it to an evaluation bundle", key="bundle")
    return _parse(str(path), _zip_reader(path, min(configs, key=len).removesuffix(CONFIG)))


def _file_reader(root: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            return read_regular(root / name, LARGEST_FILE)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise DataError(
                f"{root / name} can't be read ({why}): set it to the directory that holds {CONFIG}, or "
                f"name only tasks with data in the option tasks",
                key="bundle",
            ) from error

    return read


def _zip_reader(path: Path, prefix: str) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            with zipfile.ZipFile(path) as archive:
                info = archive.getinfo(prefix + name)
                if info.file_size > LARGEST_FILE:
                    raise ValueError(f"it has {info.file_size:,} bytes, more than {LARGEST_FILE:,}")
                with archive.open(info) as file:
                    return file.read(info.file_size)  # not more than it says, which zipfile's read would give
        except (KeyError, *ZIP_ERRORS) as error:
            raise DataError(f"{prefix + name} in {path} can't be read ({error}): get it again", key="bundle") from error

    return read


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses aliases, by which a small file can describe a huge list."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name), which are not supported")
        return super().compose_node(parent, index)


def _parse(source: str, read: Callable[[str], bytes]) -> Bundle:
    config, csv_file = read(CONFIG), read(BASELINES)
    try:
        baselines = _baselines(csv_file)
    except (ValueError, csv.Error) as error:
        raise DataError(f"{source}/{BASELINES}: {error}: get the bundle again", key="bundle") from error
    try:
        if len(config) > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
        entries = yaml.load(parse_text(config), _Loader)["icl_tasks"]
        tasks = tuple(_task(entry, baselines) for entry in entries)
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        message = f"{source}/{CONFIG}: {shorten(error, 300)}: it must list icl_tasks with label, dataset_uri, ..."
        raise DataError(message, key="bundle") from error
    labels = [task.label for task in tasks]
    if len(set(labels)) < len(labels):
        raise DataError(f"{source}/{CONFIG}: two tasks have the same label: rename one", key="bundle")
    digest = hashlib.sha256(config + b"\0" + csv_file).hexdigest()
    return Bundle(source, read, tasks, baselines_version(baselines), digest)


def _baselines(content: bytes) -> dict[str, float]:
    """Accuracy of guessing in percent, by task."""
    baselines = {}
    for row in csv.DictReader(io.StringIO(parse_text(content))):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            baselines[row["Eval Task"]] = float(row["Random baseline"])
    return baselines


def _task(entry: Mapping[str, Any], baselines: Mapping[str, float]) -> Task:
    label = entry["label"]
    if problem := name_problem(label):
        raise ValueError(f"label {shorten(label)} {problem}")
    if entry["icl_task_type"] not in get_args(TaskType):
        raise ValueError(f"{label}: icl_task_type {shorten(entry['icl_task_type'])} is not one of {', '.join(KEYS)}")
    if problem := name_problem(entry["dataset_uri"], nested=True):
        raise ValueError(f"{label}: dataset_uri {shorten(entry['dataset_uri'])} {problem}")
    if label not in baselines:
        raise ValueError(f"{label} has no random baseline in {BASELINES}")
    if not 0 <= baselines[label] < 100:
        raise ValueError(f"{label} has the random baseline {baselines[label]} in {BASELINES}; it must be in [0, 100)")
    shots = entry["num_fewshot"]
    shots = shots[0] if isinstance(shots, list) and shots else shots
    if not isinstance(shots, int) or isinstance(shots, bool) or not 0 <= shots <= MOST_SHOTS:
        raise ValueError(f"{label}: num_fewshot must be a number from 0 to {MOST_SHOTS}, not {shorten(shots)}")
    delimiter = entry.get("continuation_delimiter", " ")
    if not isinstance(delimiter, str):
        raise ValueError(f"{label}: continuation_delimiter must be a text, not {shorten(delimiter)}")
    return Task(
        label=label,
        file=entry["dataset_uri"],
        type=cast(TaskType, entry["icl_task_type"]),
        shots=shots,
        delimiter=delimiter,
        baseline=baselines[label],
    )


def baselines_version(baselines: Mapping[str, float]) -> str:
    """Name of the published version that has these baselines; "unknown" if none has."""
    for name, values in VERSIONS.items():
        if all(baselines.get(label) == value for label, value in values.items()):
            return name
    return "unknown"


# ------------------------------------------------------------------------------------------------------ downloading


def download(cache: Path, url: str = URL) -> Path:
    """Return the path of the bundle's zip in ``cache``, after downloading it if it is absent.

    The file appears once it is complete and each file in it matches its checksum. When several processes need it, one
    downloads it and the others wait.

    Raises:
        DataError: when it can't be downloaded, or is damaged.
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
            announced = answer.headers.get("Content-Length") or ""
            size = int(announced) if re.fullmatch(r"\d{1,12}", announced, re.ASCII) else None
            with tqdm(desc="evaluation bundle", total=size, unit="B", unit_scale=True, disable=None) as bar:
                for piece in iter(lambda: answer.read(1 << 20), b""):
                    file.write(piece)
                    bar.update(len(piece))
                    if file.tell() > LARGEST:
                        raise OSError(f"it has more than {LARGEST:,} bytes")
            if size is not None and file.tell() != size:
                raise OSError(f"{file.tell():,} of {size:,} bytes received")
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"the evaluation bundle can't be downloaded from {url} ({error}): run the command again, or download it "
            f"elsewhere and set this option to the zip file or its directory",
            key="bundle",
        ) from error


def _verify(path: Path, url: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > LARGEST_UNPACKED:
                raise OSError(f"its files have {unpacked:,} bytes")
            damaged = archive.testzip()
            names = archive.namelist()
    except ZIP_ERRORS as error:
        message = f"the evaluation bundle from {url} is not a valid zip file ({error}): run the command again"
        raise DataError(message, key="bundle") from error
    if damaged is not None:
        raise DataError(f"the downloaded evaluation bundle is damaged ({damaged}): run the command again", key="bundle")
    if not any(name.rpartition("/")[2] == CONFIG for name in names):
        raise DataError(f"the file at {url} has no {CONFIG}: set this option to a bundle of your own", key="bundle")
