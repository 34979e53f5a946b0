"""The distribution that the core and the default plugins come in: ``nanochat-core``, at first called ``nanochat``.

``nanochat`` on the public package index belongs to another project. Old checkpoints and old plugin packages use
that name for this distribution; an installed package of that name may be either.
"""

from __future__ import annotations

import json
import re
import urllib.parse
import urllib.request
from contextlib import suppress
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution, entry_points
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from nanochat_core import __version__
from nanochat_core.errors import PluginError

NAME = "nanochat-core"
FIRST_NAME = "nanochat"
COMMAND = "nanochat_core.cli:main"  # entry point of the command; a package that has it is this one
GROUP = "nanochat"  # entry points of plugins


def is_ours(package: Distribution) -> bool:
    """Whether an installed package is this distribution, under either name."""
    name = canonicalize_name(package.name or "")  # None when its metadata are lost
    return name == NAME or (name == FIRST_NAME and any(point.value == COMMAND for point in package.entry_points))


@cache  # the metadata are parsed at each access, and a package may bring many plugins
def identify(package: Distribution | None) -> tuple[str, str]:
    """Name and version to show and to record for an installed package.

    The version of this distribution is the code's own: the metadata of an editable installation may be older.
    """
    if package is None or not package.name:
        return "unknown", "unknown"
    return (NAME, __version__) if is_ours(package) else (package.name, package.version)


def current_name(recorded: str) -> str:
    """Today's name of a distribution that a checkpoint recorded."""
    return NAME if canonicalize_name(recorded) == FIRST_NAME else recorded


def check_core_version(package: Distribution) -> None:
    """Refuse a plugin package that requires another version of the core, under either name.

    Raises:
        PluginError: names the versions that fit.
    """
    if identify(package)[0] == NAME:
        return
    for requirement in _core_requirements(package):
        if not requirement.specifier.contains(__version__, prereleases=True):
            raise PluginError(
                f"{package.name} {package.version} requires nanochat {requirement.specifier}, this is {__version__}: "
                f"pip install '{NAME}{requirement.specifier}', or another version of {package.name}"
            )


def outdated_requirements() -> list[str]:
    """Return a message for each installed plugin package that requires the core by its first name."""
    packages = {identify(point.dist)[0]: point.dist for point in entry_points(group=GROUP) if point.dist is not None}
    return [
        f"{name} {package.version} requires {str(requirement)!r}, which on the package index is another "
        f"project's package; this one is called {NAME} now. {_remedy(package, requirement)}"
        for name, package in sorted(packages.items())
        for requirement in _core_requirements(package)
        if canonicalize_name(requirement.name) == FIRST_NAME and name != NAME
    ]


def installed_by_first_name() -> str:
    """Return a message about an installed package ``nanochat``; empty when there is none."""
    try:
        package = distribution(FIRST_NAME)
    except PackageNotFoundError:
        return ""
    if is_ours(package):
        return (
            f"{FIRST_NAME} {package.version} is an installation from before the name {NAME}: "
            f"pip uninstall {FIRST_NAME}, then install {NAME} again"
        )
    return f"{FIRST_NAME} {package.version} is another project's package, which nothing here uses"


def _core_requirements(package: Distribution) -> list[Requirement]:
    """Return a package's requirements of this distribution that apply in this environment."""
    requirements = []
    for text in package.requires or ():
        with suppress(InvalidRequirement):  # pip reports it
            requirement = Requirement(text)
            here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if here and canonicalize_name(requirement.name) in (NAME, FIRST_NAME):
                requirements.append(requirement)
    return requirements


def _remedy(package: Distribution, requirement: Requirement) -> str:
    """Return the remedy, with the line to edit if the package was installed from a directory that still exists."""
    renamed = Requirement(str(requirement))
    renamed.name = NAME
    url = json.loads(package.read_text("direct_url.json") or "{}").get("url", "")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        source = Path(urllib.request.url2pathname(parts.path))
        line = _find_requirement(source / "pyproject.toml", requirement)
        if line is not None:
            return f'Write "{renamed}" in {source / "pyproject.toml"}:{line} and install {source} again'
    return f'Write "{renamed}" under dependencies in its pyproject.toml, or install a version that requires it'


def _find_requirement(pyproject: Path, requirement: Requirement) -> int | None:
    """Return the number of the first line, from 1, with the requirement in quotes; None when there is none."""
    try:
        lines = pyproject.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for number, line in enumerate(lines, start=1):
        for quoted in re.findall(r'"[^"]+"|' + "'[^']+'", line):
            with suppress(InvalidRequirement):
                if Requirement(quoted[1:-1]) == requirement:
                    return number
    return None
