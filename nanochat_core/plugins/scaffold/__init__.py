"""Templates of a new plugin package, and a function that writes a package from them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
import string
from pathlib import Path

import attrs

from nanochat_core.errors import ConfigError
from nanochat_core.files import shorten
from nanochat_core.plugins.distribution import NAME
from nanochat_core.plugins.hookspecs import HOOK_API

HERE = Path(__file__).parent


@attrs.frozen
class _Kind:
    """The values that differ between kinds: the TOML table, the implementation's module and factory, and a summary."""

    table: str
    module: str
    factory: str
    summary: str
    options: str = ""


_KINDS = {
    "tokenizer": _Kind("tokenizer", "tokenizer", "build", "frequent words as tokens, bytes for the rest"),
    "data_source": _Kind("data", "source", "$Class", "lines of a text file", 'path = "lines.txt"\n'),
    "model": _Kind("model", "model", "$Class", "a recurrent network"),
    "optimizer": _Kind("optimizer", "optimizer", "build", "stochastic gradient descent with momentum"),
    "evaluator": _Kind("evaluators", "evaluator", "$Class", "how often the next token is among the most likely ones"),
    "logger": _Kind("loggers", "logger", "$Class", "one JSON object per line"),
}


def write_package(kind: str, name: str, directory: Path | None) -> Path:
    """Write an installable package with a working plugin.

    Args:
        kind: kind of the plugin, such as ``data_source``.
        name: its name in TOML files.
        directory: directory to write, which must not exist or be empty; by default ``nanochat-<name>`` in the working
            directory.

    Returns:
        The directory.

    Raises:
        ConfigError: when the name or the directory can't be used.
    """
    if len(name) > 60 or not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        raise ConfigError(
            f"{shorten(name)} can't be a plugin's name: use at most 60 lower-case letters, digits, - and _, with a "
            f"letter first"
        )
    distribution = f"nanochat-{name.replace('_', '-')}"
    if distribution == NAME:
        raise ConfigError(f"{distribution} is nanochat's own distribution: choose another name than {name!r}")
    package = distribution.replace("-", "_")
    if _is_installed(distribution, package):
        raise ConfigError(
            f"a package {distribution} (module {package}) is installed already, which the new one would replace: "
            f"choose another name than {name!r}"
        )
    directory = directory or Path(distribution)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not empty: give another directory")
    camel = "".join(part.capitalize() for part in re.split("[-_]", name))
    what = _KINDS[kind]
    values = {
        "kind_dashed": kind.replace("_", "-"),
        "Kind": kind.replace("_", " ").capitalize(),
        "name": name,
        "distribution": distribution,
        "package": package,
        "Class": camel,
        "Config": f"{camel}Config",
        "hook": f"nanochat_register_{kind}s",
        "module": what.module,
        "factory": what.factory.replace("$Class", camel),
        "summary": what.summary,
        "hook_api": str(HOOK_API),
    }
    for template in sorted([*(HERE / "common").iterdir(), *(HERE / kind).iterdir()]):
        name_of_file = template.name.removesuffix(".txt")  # tools leave .txt files alone
        prefix, _, rest = name_of_file.partition("_")
        path = directory / name_of_file
        if prefix in ("package", "tests"):
            path = directory / (package if prefix == "package" else "tests") / rest
        path.parent.mkdir(parents=True, exist_ok=True)
        text = template.read_text(encoding="utf-8")
        if name_of_file == "experiment.toml":
            text = _use(text, what, name)
        path.write_text(string.Template(text).substitute(values), encoding="utf-8")
    return directory


def _is_installed(distribution: str, package: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(distribution)
        return True
    return importlib.util.find_spec(package) is not None


def _use(experiment: str, what: _Kind, name: str) -> str:
    """Return the experiment with the new plugin in its table."""
    entry = f'plugin = "{name}"\n{what.options}'
    if what.table.endswith("s"):
        every = "every = 25\n" if what.table == "evaluators" else ""
        return f"{experiment}\n[[{what.table}]]\n{entry}{every}"
    return re.sub(rf"(?ms)^(\[{what.table}\]\n).*?(?=^\[|\Z)", rf"\1{entry}\n", experiment)
