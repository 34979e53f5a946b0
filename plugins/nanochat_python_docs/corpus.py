"""Documents from the running Python: the language reference that ``help()`` shows, and the docstrings of the standard
library. The files of the library are parsed; only the module with the text of the reference is imported."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

PART = 8_000  # characters; longer documents are cut at paragraph ends
SHORTEST = 200  # shorter documents are dropped
REPEATED = 60  # docstrings of at least this length appear only once in all documents

# Tests, packages that are not part of the library, generated data, and documents of other tools.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "lib-dynload"}
SKIPPED |= {"encodings", "pydoc_data", "lib2to3", "__phello__", "turtledemo"}

_CUTS = (r"\n\n(?=\S)", r"\n\n", r"\n")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def library_files(library: Path) -> Iterator[tuple[str, Path]]:
    """Dotted names and files of the library's modules, sorted by file."""
    paths: list[Path] = []
    for directory, children, names in os.walk(library):
        children[:] = [c for c in children if c not in SKIPPED and c.isidentifier()]
        paths += [Path(directory, name) for name in names if name.endswith(".py") and name[:-3].isidentifier()]
    for path in sorted(paths):
        name = ".".join(path.relative_to(library).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def clean(text: str) -> str:
    """Normalize line ends and blank lines; remove control characters and surrogates."""
    text = re.sub(r"[^\S\n]+$", "", text.expandtabs().replace("\r\n", "\n"), flags=re.MULTILINE)
    text = re.sub(r"^\$(Id|Revision|Date).*\$$", "", text, flags=re.MULTILINE)
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f\ud800-\udfff]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def title(text: str) -> str:
    return f"{text}\n{'*' * len(text)}"


def signature(node: Function, method: bool) -> str:
    """Arguments of a function in parentheses, without self or cls."""
    arguments = node.args
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if method and not static:
        first = arguments.posonlyargs or arguments.args
        del first[:1]
    text = ast.unparse(arguments)
    return f"({text})" if len(text) < 200 else "(...)"


def heading(node: Function | ast.ClassDef, qualified: str, method: bool) -> str:
    """Heading of a class or function in one line, in the style of Python's manual."""
    if isinstance(node, ast.ClassDef):
        bases = [ast.unparse(base) for base in node.bases if ast.unparse(base) != "object"]
        return f"class {qualified}" + (f"({', '.join(bases)})" if bases else "")
    decorators = {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}
    if decorators & {"property", "cached_property", "abstractproperty"}:
        return f"property {qualified}"
    words: list[str] = [word for word in ("classmethod", "staticmethod") if word in decorators]
    if isinstance(node, ast.AsyncFunctionDef):
        words.append("async")
    return " ".join([*words, qualified + signature(node, method)])


def docstrings(body: list[ast.stmt], module: str, owner: str = "") -> Iterator[tuple[str, str]]:
    """Heading and text of every documented class, function and method, in the order of the file."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node, clean=False):
                yield heading(node, f"{owner or module}.{node.name}", method=bool(owner)), text
            if isinstance(node, ast.ClassDef):
                yield from docstrings(node.body, module, f"{owner}.{node.name}".removeprefix("."))
        elif isinstance(node, ast.If | ast.Try):
            handlers = [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            yield from docstrings([*node.body, *handlers, *node.orelse], module, owner)


def module_document(name: str, tree: ast.Module, seen: set[str]) -> str:
    """Title, the module's docstring, and an entry for each documented class and function; "" without any docstring.

    Docstrings in ``seen`` are left out, and those that are used are added to it.
    """
    blocks = []
    if text := clean(inspect.cleandoc(ast.get_docstring(tree, clean=False) or "")):
        blocks.append(text)
    headings = set()
    for head, raw in docstrings(tree.body, name):
        text = clean(inspect.cleandoc(raw))
        if not text or head in headings or text in seen:
            continue
        headings.add(head)
        if len(text) >= REPEATED:
            seen.add(text)
        indented = "\n".join("   " + line if line else "" for line in text.split("\n"))
        blocks.append(f"{head}\n\n{indented}")
    return "\n\n".join([title(name), *blocks]) if blocks else ""


def topic_documents() -> dict[str, str]:
    """The language reference. Topics that mostly repeat longer ones are left out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return {}
    seen: set[str] = set()
    kept = {}
    for name, raw in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        text = clean(raw)
        paragraphs = text.split("\n\n")
        if sum(len(p) for p in paragraphs if p in seen) < len(text) / 5:
            seen.update(paragraphs)
            kept[name] = text
    return kept


def documents(source: bool, library: Path | None = None) -> dict[str, str]:
    """All documents by name: ``topic:...``, then ``module:...``, then, if ``source`` is true, ``source:...``.

    Args:
        source: whether to add source code.
        library: directory of the standard library; None: that of the running Python.
    """
    found = {f"topic:{name}": text for name, text in topic_documents().items()}
    sources = {}
    seen: set[str] = set()
    for name, path in library_files(library or Path(sysconfig.get_path("stdlib"))):
        try:
            with tokenize.open(path) as file:
                code = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escape sequences in docstrings
                tree = ast.parse(code)
        except (OSError, SyntaxError, ValueError):
            continue
        found[f"module:{name}"] = module_document(name, tree, seen)
        sources[f"source:{name}"] = clean(code)
    return {name: text for name, text in {**found, **(sources if source else {})}.items() if len(text) >= SHORTEST}


def parts(text: str) -> list[str]:
    """Split a text into pieces of about ``PART`` characters: before an unindented paragraph, a paragraph, or a line."""
    pieces: list[str] = []
    while len(text) > PART * 5 // 4:
        window = text[:PART]
        cuts = (max((m.start() for m in re.finditer(pattern, window)), default=0) for pattern in _CUTS)
        cut = next((cut for cut in cuts if cut > PART // 2), PART)
        pieces.append(text[:cut].rstrip())
        text = text[cut:].lstrip("\n")
    return [piece for piece in [*pieces, text] if piece]


def all_parts(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """Parts of each document, without parts that occurred before."""
    seen: set[str] = set()
    cut = {}
    for name, text in texts.items():
        fresh = [part for part in parts(text) if part not in seen]
        seen.update(fresh)
        cut[name] = fresh
    return cut
