"""Finished tokenizers are shared by equal settings, and never by others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from helpers.fakes import FakeSource, trained_choice
from helpers.support import ROOT

from nanochat_core import DataError
from nanochat_core.data.tokenizer_cache import MadeTokenizer, load_tokenizer, make_tokenizer
from nanochat_core.files import cache_dir
from nanochat_core.plugins.choice import Choice


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make(what: Choice | None = None, source: FakeSource | None = None, said: list[str] | None = None) -> MadeTokenizer:
    return make_tokenizer(what or trained_choice(), source or FakeSource(), (said if said is not None else []).append)


def test_equal_settings_share_one() -> None:
    first = make()
    source = FakeSource()
    second = make(trained_choice(), source)
    assert first.seconds > 0
    assert second.seconds == 0
    assert second.directory == first.directory
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert source.reads == 0


@pytest.mark.parametrize("options", [{"vocab_size": 301}, {"documents": 5}])
def test_changed_settings_never_share(options: dict[str, int]) -> None:
    assert make().tokenizer.fingerprint != make(trained_choice(**options)).tokenizer.fingerprint


def test_what_else_it_is_made_from_counts() -> None:
    first = make()
    assert make(source=FakeSource(200)).directory != first.directory
    what = trained_choice()
    newer = attrs.evolve(what, entry=attrs.evolve(what.entry, version="99"))
    assert make(newer).directory != first.directory


def test_the_content_of_files_counts_not_their_name(tmp_path: Path) -> None:
    make().tokenizer.save(tmp_path)
    file, moved = tmp_path / "pairs.txt", tmp_path / "moved.txt"
    moved.write_bytes(file.read_bytes())
    assert make(trained_choice(path=file)).directory == make(trained_choice(path=moved)).directory
    moved.write_text(moved.read_text().rpartition("\n")[0])
    changed = make(trained_choice(path=moved))
    assert changed.directory != make(trained_choice(path=file)).directory
    assert changed.tokenizer.vocab_size == 299


def test_a_damaged_one_is_made_anew() -> None:
    first = make()
    (first.directory / "pairs.txt").write_text("?")
    said: list[str] = []
    again = make(said=said)
    assert again.seconds > 0
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert "damaged" in said[0]


def test_a_failed_training_leaves_nothing(home: Path) -> None:
    with pytest.raises(DataError, match="vocab_size"):
        make(trained_choice(vocab_size=60_000))
    assert [p for p in (home / "tokenizers").iterdir() if p.is_dir()] == []


def test_copies_are_independent(tmp_path: Path) -> None:
    made = make()
    made.copy_to(tmp_path / "tokenizer")
    (made.directory / "pairs.txt").unlink()
    assert load_tokenizer(trained_choice(), tmp_path / "tokenizer").fingerprint == made.tokenizer.fingerprint
    assert [p.name for p in tmp_path.glob("*tokenizer*")] == ["tokenizer"]


TRAIN = """
import sys
from pathlib import Path
from helpers.fakes import FakeSource, trained_choice
from nanochat_core.data.tokenizer_cache import make_tokenizer

waited = Path(sys.argv[1])

def report(line):
    if "another process" in line:
        waited.touch()

made = make_tokenizer(trained_choice(wait_for=waited), FakeSource(), report)
print(made.seconds > 0, made.tokenizer.fingerprint)
"""


def test_two_processes_train_it_once(tmp_path: Path) -> None:
    # the training of one ends when the other says that it waits
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(tmp_path / "waited")],
            cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    answers = [process.communicate(timeout=300)[0].split() for process in started]
    assert sorted(trained for trained, _ in answers) == ["False", "True"]
    assert answers[0][1] == answers[1][1]


def test_cache_is_under_the_home(home: Path) -> None:
    assert make().directory.parent.parent == home == cache_dir()
