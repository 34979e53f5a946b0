"""The distribution that the core and the default plugins come in: ``nanochat-core``, at first called ``nanochat``.

``nanochat`` on the public package index belongs to another project. Old checkpoints and old plugin packages mean this
distribution by that name; an installed package of that name may be either.
"""

from __future__ import annotations

import json
import re
import urllib.parse
import urllib.request
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
    name = canonicalize_name(package.name)
    return name == NAME or (name == FIRST_NAME and any(point.value == COMMAND for point in package.entry_points))


def identify(package: Distribution | None) -> tuple[str, str]:
    """Name and version to show and to record for an installed package.

    The version of this distribution is the code's own: the metadata of an editable installation may be older.
    """
    if package is None:
        return "unknown", "unknown"
    return (NAME, __version__) if is_ours(package) else (package.name, package.version)


def current_name(recorded: str) -> str:
    """Today's name of a distribution that a checkpoint recorded."""
    return NAME if canonicalize_name(recorded) == FIRST_NAME else recorded


def check_core_version(package: Distribution) -> None:
    """Refuse a plugin package that requires another version of the core, under either name.

    Raises:
        PluginError: saying which versions fit.
    """
    for requirement in _core_requirements(package):
        if not requirement.specifier.contains(__version__, prereleases=True):
            raise PluginError(
                f"{package.name} {package.version} fits nanochat {requirement.specifier}, this is {__version__}: "
                f"pip install '{NAME}{requirement.specifier}', or another version of {package.name}"
            )


def outdated_requirements() -> list[str]:
    """What to say of each installed plugin package that requires the core by its first name."""
    packages = {point.dist.name: point.dist for point in entry_points(group=GROUP) if point.dist is not None}
    return [
        f"{package.name} {package.version} requires {str(requirement)!r}, which on the package index is another "
        f"project's package; this one is called {NAME} now. {_how_to_mend(package, requirement)}"
        for _, package in sorted(packages.items())
        for requirement in _core_requirements(package)
        if canonicalize_name(requirement.name) == FIRST_NAME and not is_ours(package)
    ]


def installed_by_first_name() -> str:
    """What to say of an installed package ``nanochat``; empty when there is none."""
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
    """A package's requirements of this distribution that hold in this environment."""
    requirements = [Requirement(text) for text in package.requires or ()]
    return [
        requirement
        for requirement in requirements
        if canonicalize_name(requirement.name) in (NAME, FIRST_NAME)
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]


def _how_to_mend(package: Distribution, requirement: Requirement) -> str:
    """Which line to edit, when the package was installed from a directory that is still there."""
    renamed = Requirement(str(requirement))
    renamed.name = NAME
    url = json.loads(package.read_text("direct_url.json") or "{}").get("url", "")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        source = Path(urllib.request.url2pathname(parts.path))
        line = _find_requirement(source / "pyproject.toml", requirement)
        if line is not None:
            return f'Write "{renamed}" in {source / "pyproject.toml"}:{line} and install {source} again'
    return f'Write "{renamed}" under dependencies in its pyproject.toml, or install a version of it that has that'


def _find_requirement(pyproject: Path, requirement: Requirement) -> int | None:
    """Number of the first line, from 1, that has the requirement in quotes; None when there is none."""
    try:
        lines = pyproject.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for number, line in enumerate(lines, start=1):
        for quoted in re.findall(r'"[^"]+"|' + "'[^']+'", line):
            try:
                if Requirement(quoted[1:-1]) == requirement:
                    return number
            except InvalidRequirement:
                continue
    return None
