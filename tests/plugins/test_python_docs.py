from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_core import DataContext, DataError
from nanochat_python_docs import corpus
from nanochat_python_docs.config import PythonDocsConfig
from nanochat_python_docs.source import PythonDocs, build, make_splits

ROOT = Path(__file__).parents[2]


def docs(cache_dir: Path, **options) -> PythonDocs:  # type: ignore[no-untyped-def]
    return build(PythonDocsConfig(**options), DataContext(cache_dir=cache_dir))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(cache: Path) -> PythonDocs:
    return docs(cache)


def test_size_and_shape(built: PythonDocs) -> None:
    train, val = built.documents("train"), built.documents("val")
    assert len(train) > 300
    assert sum(map(len, train)) > 1_000_000
    assert 0.01 < len(val) / (len(train) + len(val)) < 0.15
    both = [*train, *val]
    assert len(set(both)) == len(both)
    assert all(len(text) <= 10_000 for text in both)
    assert not any(re.search(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]|\n\n\n|[ \t]$", text) for text in both)


def test_reads_well(built: PythonDocs) -> None:
    both = [*built.documents("train"), *built.documents("val")]
    (abc,) = (text for text in both if text.startswith("abc\n***\n"))
    assert "\n\nabc.abstractmethod(funcobj)\n\n   A decorator indicating abstract methods.\n" in abc
    assert any('The "assert" statement\n****' in text for text in both)


def test_later_starts_read_the_cache(cache: Path, built: PythonDocs, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("looked again")

    monkeypatch.setattr(corpus, "documents", never)
    again = docs(cache)
    assert again.documents("train") == built.documents("train")
    assert again.fingerprint("val") == built.fingerprint("val")


LIBRARY = {
    "plain.py": '''"""A module for trying things out, with a docstring that is long enough not to be dropped at once."""
import nowhere_to_be_found
raise SystemExit("never imported")
class Box(dict):
    """Holds things until they are needed, which may take a while.

    The second paragraph says a little more about it, at some length.
    """
    def open(self, *, slowly: bool = False) -> None:
        """Open the box."""
    @property
    def weight(self):
        """Kilograms."""
    @classmethod
    async def find(cls, name, /):
        """Look for it."""
    def undocumented(self): ...
try:
    import fast
except ImportError:
    def fallback():
        """Used where the other is missing."""
''',
    "package/__init__.py": '"""' + "The package does what its modules do, all of them together. " * 5 + '"""\n',
    "package/long.py": '"""Paragraphs.\n\n'
    + "".join(f"Number {i} says {'la ' * 40}\n\n" for i in range(200))
    + '"""\n',
    "twin_a.py": '"""' + "The very same text, which no one needs to read twice. " * 8 + '"""\n',
    "tiny.py": '"""Small."""\n',
    "broken.py": '"""' + "Not Python any more. " * 20 + '"""\n)(\n',
    "latin.py": b'"""' + b"Caf\xe9 without saying which encoding it is in. " * 9 + b'"""\n',
    "test/test_it.py": '"""' + "Tests are not documentation. " * 20 + '"""\n',
    "site-packages/other.py": '"""' + "Somebody else's package. " * 20 + '"""\n',
    "package/bad-name.py": '"""' + "Not a module. " * 40 + '"""\n',
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, content in LIBRARY.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / "lib"


def modules(library: Path, source: bool = False) -> dict[str, str]:
    return {name: text for name, text in corpus.documents(source, library).items() if not name.startswith("topic:")}


def test_which_modules_count(library: Path) -> None:
    assert set(modules(library)) == {"module:plain", "module:package", "module:package.long", "module:twin_a"}


def test_module_document(library: Path) -> None:
    assert (
        modules(library)["module:plain"]
        == """plain
*****

A module for trying things out, with a docstring that is long enough not to be dropped at once.

class plain.Box(dict)

   Holds things until they are needed, which may take a while.

   The second paragraph says a little more about it, at some length.

Box.open(*, slowly: bool=False)

   Open the box.

property Box.weight

   Kilograms.

classmethod async Box.find(name, /)

   Look for it.

plain.fallback()

   Used where the other is missing."""
    )


def test_long_documents_are_cut_between_paragraphs(library: Path) -> None:
    parts = corpus.parts(modules(library)["module:package.long"])
    assert len(parts) > 2
    assert all(4_000 < len(part) <= 10_000 for part in parts[:-1])
    assert all(part.startswith("Number ") for part in parts[1:])
    assert "\n\n".join(parts) == modules(library)["module:package.long"]
    assert all(len(part) <= 10_000 for part in corpus.parts("x" * 50_000))


def test_repeated_docstrings_appear_once(library: Path) -> None:
    function = 'def f():\n    """' + "Says the same thing wherever it is copied to. " * 6 + '"""\n'
    (library / "copy_a.py").write_text(function)
    (library / "copy_b.py").write_text(function)
    assert {"module:copy_a"} == {name for name in modules(library) if "copy" in name}


def test_source_is_on_the_side_of_its_documentation(library: Path) -> None:
    for i in range(40):
        words = f"Module number {i} is about the number {i} and its uses. " * 6
        (library / f"m{i}.py").write_text(f'"""{words}"""\nanswer = {i}\n')
    assert "answer = 7" in modules(library, source=True)["source:m7"]
    splits = make_splits(PythonDocsConfig(source=True, val_fraction=0.3), library)
    sides = {
        split: {m for text in texts for m in re.findall(r"Module number (\d+) is", text)}
        for split, texts in splits.items()
    }
    assert len(sides["train"] | sides["val"]) == 40
    assert not sides["train"] & sides["val"]
    assert len(sides["val"]) > 4


def test_order_does_not_depend_on_other_documents(library: Path) -> None:
    before = make_splits(PythonDocsConfig(val_fraction=0.5), library)
    (library / "another.py").write_text('"""' + "One more module comes in between. " * 10 + '"""\n')
    after = make_splits(PythonDocsConfig(val_fraction=0.5), library)
    for split, texts in before.items():
        assert [text for text in after[split] if not text.startswith("another\n")] == texts
    assert sum(map(len, after.values())) == sum(map(len, before.values())) + 1


def test_damaged_cache_is_made_again(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_library(library, monkeypatch)
    first = docs(tmp_path)
    (file,) = tmp_path.glob("*.json")
    file.write_text("[")
    assert docs(tmp_path).documents("train") == first.documents("train")
    assert docs(tmp_path, val_fraction=0.5).documents("val") != first.documents("val")
    assert len(list(tmp_path.glob("*.json"))) == 2


def use_library(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(150):
        (library / f"m{i}.py").write_text('"""' + f"Module {i} is one of many, and says so. " * 9 + '"""\n')
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(library))


def test_library_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "python311.zip"))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"gives only 0 documents .*; install it in full, or choose another"):
        docs(tmp_path)


def test_two_processes_at_once(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_library(library, monkeypatch)
    cache = tmp_path / "cache"
    cache.mkdir()
    code = (
        "import sys, sysconfig, pathlib\n"
        "from tests.plugins.test_python_docs import docs\n"
        "library, cache = sys.argv[1:]\n"
        "sysconfig.get_path = lambda _: library\n"
        "print(docs(pathlib.Path(cache)).fingerprint('train'))\n"
    )
    command = [sys.executable, "-c", code, str(library), str(cache)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = {process.communicate(timeout=300)[0].strip() for process in both}
    assert found == {docs(cache).fingerprint("train")}
    (file,) = cache.iterdir()
    assert file.suffix == ".json"


@pytest.mark.parametrize("wrong", [0.0, 0.6])
def test_config(wrong: float) -> None:
    with pytest.raises(ValueError, match="between"):
        PythonDocsConfig(val_fraction=wrong)
