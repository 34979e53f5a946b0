"""Run directories: made once, found by reference, locked while somebody trains in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.fuzzing import snapshot

from nanochat_core import CheckpointError, ConfigError
from nanochat_core.files import remove
from nanochat_core.runs.directory import RunDirectory, all_runs, create_run, find_run, remove_start


def make(runs: Path, name: str) -> RunDirectory:
    run, lock = create_run(runs, name)
    lock.release()
    run.experiment.write_text("")
    run.begin()
    run.ledger.touch()
    return run


def test_ids_differ_and_sort_by_age(tmp_path: Path) -> None:
    made = [make(tmp_path, "x") for _ in range(20)]
    assert len({run.id for run in made}) == 20
    assert [run.id for run in all_runs(tmp_path, "x")] == [run.id for run in reversed(made)]


def test_ids_sort_by_age_although_the_clock_goes_backwards(tmp_path: Path) -> None:
    future = tmp_path / "a" / "29991231-235959-999998"
    future.mkdir(parents=True)
    (tmp_path / "a" / "zzz").mkdir()  # somebody's own
    assert create_run(tmp_path, "a")[0].id == "29991231-235959-999999"
    assert create_run(tmp_path, "a")[0].id == "30000101-000000-000000"


def test_what_a_reference_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    old, new, other = make(runs, "x"), make(runs, "x"), make(runs, "y")
    assert find_run("x", runs) == new
    assert find_run("y", runs) == other
    assert find_run(old.id, runs) == old
    assert find_run(f"x/{old.id}", runs) == old
    assert find_run(str(old.path), runs) == old
    assert find_run(str(runs / "x"), tmp_path / "elsewhere") == new
    monkeypatch.chdir(old.path)
    here = find_run(".", runs)
    assert (here.name, here.id) == ("x", old.id)


def test_an_unknown_run_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run 'x' under .*there are no runs yet"):
        find_run("x", tmp_path / "nowhere")
    make(tmp_path, "baseline")
    with pytest.raises(CheckpointError, match=r'did you mean "baseline"'):
        find_run("basline", tmp_path)
    with pytest.raises(CheckpointError, match=r"there is baseline"):
        find_run("xyz", tmp_path)
    with pytest.raises(CheckpointError):
        find_run("", tmp_path)


def test_directories_without_an_experiment_are_no_runs(tmp_path: Path) -> None:
    create_run(tmp_path, "x")
    assert all_runs(tmp_path) == []
    assert all_runs(tmp_path / "nowhere") == []


def test_what_killed_starts_left_goes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "x" / "20200101-000000-000000").mkdir(parents=True)  # killed before it had a lock
    deleting = RunDirectory(tmp_path / "x" / "20200102-000000-000000")
    deleting.tokenizer.mkdir(parents=True)  # killed while it was deleted
    deleting.starting.touch()
    (tmp_path / "x" / "notes").mkdir()
    killed, lock = create_run(tmp_path, "x")
    lock.release()
    finished = make(tmp_path, "x")  # deletes it
    untrained, lock = create_run(tmp_path, "x")
    untrained.experiment.write_text("")
    lock.release()
    starting, lock = create_run(tmp_path, "x")
    new, other = create_run(tmp_path, "x")
    names = {p.name for p in (tmp_path / "x").iterdir()}
    assert not killed.path.exists()
    assert not untrained.path.exists()
    assert names == {"notes", finished.id, starting.id, new.id}
    lock.release()
    other.release()


@pytest.mark.parametrize("gone", [["ledger"], ["ledger", "checkpoints"], ["ledger", "checkpoints", "status", "lock"]])
def test_what_ever_had_a_ledger_is_never_deleted(tmp_path: Path, gone: list[str]) -> None:
    """Whatever is missing in it now: it is not known by that."""
    run = make(tmp_path, "x")
    run.write_status("finished", 3, 3)
    run.tokenizer.mkdir()
    for name in gone:
        remove({"lock": run.path / "lock"}.get(name) or getattr(run, name))
    before = snapshot(run.path)
    for _ in range(2):
        create_run(tmp_path, "x")[1].release()
    assert not remove_start(run)
    assert snapshot(run.path) == before


@pytest.mark.parametrize(
    "name", ["checkpoints/step_000004", "evaluations/core_000004", "my notes.txt", "metrics.jsonl"]
)
def test_what_a_start_did_not_make_stays(tmp_path: Path, name: str) -> None:
    run, lock = create_run(tmp_path, "x")
    (run.path / name).mkdir(parents=True)
    with lock:
        assert not remove_start(run)
    create_run(tmp_path, "x")[1].release()
    assert (run.path / name).is_dir()


# ------------------------------------------------------------------------------------------ moved while it is locked


def test_a_locked_directory_is_found_wherever_it_is(tmp_path: Path) -> None:
    run, lock = create_run(tmp_path, "x")
    assert (lock.where(), lock.lost()) == (run.path, "")
    (tmp_path / "x").rename(tmp_path / "y")
    moved = tmp_path / "y" / run.id
    assert (lock.where(), lock.lost()) == (moved, f"was moved to {moved}")
    run.path.mkdir(parents=True)  # another of the old name
    assert lock.where() == moved
    shutil.rmtree(tmp_path / "y")
    assert (lock.where(), lock.lost()) == (None, "was replaced by another")
    shutil.rmtree(tmp_path / "x")
    assert (lock.where(), lock.lost()) == (None, "was deleted")
    lock.release()
    lock.release()


def test_a_link_to_where_it_was_moved_is_as_good(tmp_path: Path) -> None:
    run, lock = create_run(tmp_path, "x")
    (tmp_path / "x").rename(tmp_path / "y")
    (tmp_path / "x").symlink_to(tmp_path / "y")
    assert lock.where() == run.path
    lock.release()


def test_leftovers_of_writes_go(tmp_path: Path) -> None:
    run = make(tmp_path, "x")
    run.write_status("running", 3, 10)
    for name in (".status.json.12", ".experiment.toml.3", ".tokenizer.ab12", ".somebodys"):
        (run.path / name).touch()
    assert run.remove_leftovers() == [".experiment.toml.3", ".status.json.12", ".tokenizer.ab12"]
    assert {p.name for p in run.path.glob(".*")} == {".somebodys"}
    assert run.read_status()["step"] == 3


def test_an_unwritable_place_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--runs-dir: can't write .*file/runs.*--runs-dir DIR"):
        create_run(tmp_path / "file" / "runs", "x")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = make(tmp_path, "x")
    assert not run.is_locked()
    with run.lock():
        assert run.is_locked()
        with pytest.raises(CheckpointError, match="another process is training this run"):
            run.lock()
    assert not run.is_locked()
    run.lock().release()


def test_a_run_that_is_not_running_any_more_was_killed(tmp_path: Path) -> None:
    run = make(tmp_path, "x")
    assert run.read_status() == {}
    run.write_status("running", 3, 10)
    with run.lock():
        assert run.read_status()["status"] == "running"
    assert run.read_status()["status"] == "killed"
    run.write_status("finished", 10, 10)
    status = run.read_status()
    assert (status["status"], status["step"], status["num_iterations"]) == ("finished", 10, 10)
