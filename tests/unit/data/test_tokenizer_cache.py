"""Finished tokenizers are shared by equal settings, and never by others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest

from nanochat_bpe.config import BPEConfig
from nanochat_core import DataError, DataSource
from nanochat_core.data.tokenizer_cache import MadeTokenizer, load_tokenizer, make_tokenizer
from nanochat_core.files import cache_dir
from nanochat_core.interfaces.types import Split
from nanochat_core.plugins.choice import Choice, EntryKeys
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.testing import sample_documents
from nanochat_tiktoken.config import TiktokenConfig

ROOT = Path(__file__).parents[3]


class Source(DataSource):
    def __init__(self, count: int = 300) -> None:
        self.count = count
        self.reads = 0

    def documents(self, split: Split) -> Sequence[str]:
        self.reads += 1
        return sample_documents(self.count)

    def fingerprint(self, split: Split) -> str:
        return f"{split} {self.count}"


def choice(**options: object) -> Choice:
    return Choice(EntryKeys("bpe"), load_plugins()["tokenizer"].get("bpe"), BPEConfig(**{"vocab_size": 400, **options}))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make(what: Choice | None = None, source: Source | None = None, said: list[str] | None = None) -> MadeTokenizer:
    return make_tokenizer(what or choice(), source or Source(), (said if said is not None else []).append)


def test_equal_settings_share_one() -> None:
    first = make()
    source = Source()
    second = make(choice(), source)
    assert first.seconds > 0
    assert second.seconds == 0
    assert second.directory == first.directory
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert source.reads == 0


@pytest.mark.parametrize("options", [{"vocab_size": 401}, {"doc_cap": 20}, {"max_chars": 3000}])
def test_changed_settings_never_share(options: dict[str, int]) -> None:
    assert make().tokenizer.fingerprint != make(choice(**options)).tokenizer.fingerprint


def test_what_else_it_is_made_from_counts() -> None:
    first = make()
    assert make(source=Source(200)).directory != first.directory
    what = choice()
    newer = attrs.evolve(what, entry=attrs.evolve(what.entry, version="99"))
    assert make(newer).directory != first.directory


def test_the_content_of_files_counts_not_their_name(tmp_path: Path) -> None:
    make().tokenizer.save(tmp_path)
    entry = load_plugins()["tokenizer"].get("tiktoken")
    pattern = BPEConfig().pattern
    moved = tmp_path / "moved.tiktoken"
    moved.write_bytes((tmp_path / "merges.tiktoken").read_bytes())
    directories = [
        make(Choice(EntryKeys("tiktoken"), entry, TiktokenConfig(path=path, pattern=pattern))).directory
        for path in (tmp_path / "merges.tiktoken", moved)
    ]
    assert directories[0] == directories[1]
    lines = moved.read_text().splitlines(keepends=True)
    moved.write_text("".join(lines[:-1]))
    changed = make(Choice(EntryKeys("tiktoken"), entry, TiktokenConfig(path=moved, pattern=pattern)))
    assert changed.directory != directories[0]
    assert changed.tokenizer.vocab_size == 399


def test_a_damaged_one_is_made_anew() -> None:
    first = make()
    (first.directory / "merges.tiktoken").write_text("?")
    said: list[str] = []
    again = make(said=said)
    assert again.seconds > 0
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert "damaged" in said[0]


def test_a_failed_training_leaves_nothing(home: Path) -> None:
    with pytest.raises(DataError, match="vocab_size"):
        make(choice(vocab_size=60_000))
    assert [p for p in (home / "tokenizers").iterdir() if p.is_dir()] == []


def test_copies_are_independent(tmp_path: Path) -> None:
    made = make()
    made.copy_to(tmp_path / "tokenizer")
    (made.directory / "merges.tiktoken").unlink()
    assert load_tokenizer(choice(), tmp_path / "tokenizer").fingerprint == made.tokenizer.fingerprint
    assert [p.name for p in tmp_path.glob("*tokenizer*")] == ["tokenizer"]


def test_two_processes_train_it_once(home: Path) -> None:
    code = (
        "from unit.data.test_tokenizer_cache import make, choice\n"
        "made = make(choice(vocab_size=3000))\nprint(made.seconds > 0, made.tokenizer.fingerprint)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=120)[0].split() for process in started]
    assert sorted(trained for trained, _ in answers) == ["False", "True"]
    assert answers[0][1] == answers[1][1]


def test_cache_is_under_the_home(home: Path) -> None:
    assert make().directory.parent.parent == home == cache_dir()
