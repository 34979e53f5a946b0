"""Hooks of MkDocs: pages that lie outside ``docs/``, and files that the guides link to.

On the site README.md is the start page. Links are rewritten, so that a link between two Markdown files works on the
site as it does in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Where pages outside docs/ are on the site.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for experiment in sorted((ROOT / "experiments").rglob("*")):
        if experiment.suffix in (".toml", ".sbatch"):
            target = experiment.relative_to(ROOT).as_posix()
            files.append(File.generated(config, target, abs_src_path=str(experiment)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from where a page lies in the repository to where it lies on the site."""
    here = next((source for source, target in OUTSIDE.items() if target == page.file.src_uri), None)
    source = Path(here or f"docs/{page.file.src_uri}")
    depth = page.file.src_uri.count("/")

    def on_site(match: re.Match[str]) -> str:
        target = normpath((source.parent / match[2]).as_posix())
        target = OUTSIDE.get(target, target.removeprefix("docs/"))
        return f"{match[1]}{'../' * depth}{target}{match[3]}"

    return LINK.sub(on_site, markdown)
