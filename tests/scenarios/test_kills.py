"""Kill -9 and SIGTERM at any moment: the same command, again and again, reaches the uninterrupted run's result.

The run is of the shipped plugins bpe, parquet, gpt, muon_adamw, bpb and samples: what they write is killed, too.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import torch.distributed
from helpers.killing import SAVE_EVERY, Launch, Place, Point, write_killed
from helpers.support import assert_same_end

from nanochat_core.runs.checkpoint import verify

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc"),
]


@attrs.define
class Campaign:
    """Kills the run of one experiment at one point after the other; a run that ends is followed by a fresh one.

    Args:
        whole: the run that nothing interrupted.
    """

    file: Path
    directory: Path
    whole: Path
    seed: int
    hit: set[tuple[int, str]] = attrs.field(factory=set)
    kills: int = 0
    _place: Place = attrs.field(init=False)
    _places: int = 0
    _left: set[Path] = attrs.field(factory=set)

    def __attrs_post_init__(self) -> None:
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._place = Place(self.file, self.directory / f"{self._places}")
        self._places, self._left = self._places + 1, set()

    def kill(self, point: Point) -> Launch:
        """Start the run and kill it at ``point``, which it may not come to before it ends."""
        place = self._place
        launch = place.launch(point, cut=random.Random(f"{self.seed} {point}").random())
        place.assert_nothing_lost()
        left = place.leftovers()
        if "run directory" in launch.out:  # it started to train: what was left before is gone
            assert not left & self._left, point
        self._left = left
        if launch.struck:
            assert launch.code != 0, point
            self.hit.add((point.rank, point.phase))
            self.kills += 1
        else:
            assert launch.code == 0, (point, launch.err)
            place.assert_ended_like(self.whole)
            self._start_afresh()
        return launch

    def end(self) -> None:
        """Let the run end."""
        launch = self._place.launch()
        assert launch.code == 0, launch.err
        self._place.assert_nothing_lost()
        self._place.assert_ended_like(self.whole)


def uninterrupted(tmp_path: Path, asynchronous: bool, steps: int) -> tuple[Path, Place, Launch]:
    file = write_killed(tmp_path, steps, asynchronous)
    place = Place(file, tmp_path / "whole")
    launch = place.launch()
    assert launch.code == 0, launch.err
    return file, place, launch


def early(launch: Launch) -> set[tuple[int, str]]:
    """Phases that a rank comes to only before the first step."""
    before = {(r, phase) for r, trace in launch.trace.items() for phase in trace[: trace.index("evaluate bpb")]}
    later = {(r, phase) for r, trace in launch.trace.items() for phase in trace[trace.index("evaluate bpb") :]}
    return before - later


def points(launch: Launch, draw: random.Random) -> Iterator[Point]:
    """A point in each phase: those at the start in their order, the others in any."""
    counts, first = launch.counts(), early(launch)
    others = [key for key in counts if key not in first]
    draw.shuffle(others)
    for rank, phase in (*[key for key in counts if key in first], *others):
        # mostly early, so that a run is killed many times before it ends; sometimes near the end
        nth = 1 + int((counts[rank, phase] - 1) * draw.random() ** 4)
        yield Point(rank, phase, nth, draw.choices(["rank", "job"], [2, 1])[0])


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
def test_killed_in_every_phase(tmp_path: Path, asynchronous: bool) -> None:
    """Phases that only a resumed run comes to are found on the way: each is hit after the kill that led to it. What
    saving in the background does not change is left out the second time."""
    file, place, launch = uninterrupted(tmp_path, asynchronous, steps=36)
    campaign = Campaign(file, tmp_path / "killed", place.run(), seed=asynchronous)

    def counts(phase: str) -> bool:
        concerned = ("step", "saving", "status", "metrics.jsonl", "the end")
        return not asynchronous or any(word in phase for word in concerned)

    queue = [[point] for point in points(launch, random.Random(asynchronous)) if counts(point.phase)]
    known = {key for key in launch.counts() if counts(key[1])}
    per_step = launch.counts()[0, "all_gather in a step"] // 36
    # What leaves a checkpoint that is whole but for its name; what leaves ledger lines of steps after a checkpoint.
    after_a_save = Point(0, "all_gather in a step", nth=(SAVE_EVERY + 1) * per_step + 1)
    leading = {"new step": Point(0, "rename checkpoints/step"), "rewound": after_a_save, "truncate run": after_a_save}
    leading["remove run/"] = Point(0, "broadcast in building")  # all files of a run that has no ledger yet
    before: Point | None = None
    tries: Counter[tuple[int, str]] = Counter()
    while queue:
        chain = queue.pop(0)
        for point in chain:
            started = time.monotonic()
            met = campaign.kill(point)
            tries[point.rank, point.phase] += 1
            how = f"{time.monotonic() - started:.0f} s{'' if met.struck else ', not met'}"
            print(f"{campaign.kills} kills, {len(queue)} points left: {point}, {how}", flush=True)
            # What others still do when one has died can't be hit by killing another in the same launch.
            alone = point.rank if met.struck and point.what == "rank" else None
            for key in met.counts():
                if before is not None and key not in known and counts(key[1]) and alone in (None, key[0]):
                    known.add(key)
                    leads = next((point for word, point in leading.items() if word in key[1]), before)
                    queue.append([leads, Point(*key)])
            before = point if met.struck else None
        key = point.rank, point.phase
        if key not in campaign.hit and tries[key] < 5:
            queue.append([*chain[:-1], attrs.evolve(chain[-1], nth=1)])
    campaign.end()
    assert known == campaign.hit
    assert campaign.kills >= 30


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Place, Launch]:
    return uninterrupted(tmp_path_factory.mktemp("short"), asynchronous=False, steps=12)


def test_killed_a_few_times(short: tuple[Path, Place, Launch], tmp_path: Path) -> None:
    """One of each kind: files, the tokenizer, a checkpoint, the ledger, a collective, all processes."""
    file, place, launch = short
    campaign = Campaign(file, tmp_path, place.run(), seed=1)
    for point in (
        Point(0, "copy new tokenizer/merges.tiktoken"),
        Point(0, "write run/new experiment.toml", what="job"),
        Point(0, "save new step/optimizer.safetensors", nth=2),
        Point(1, "all_gather in a step", nth=7),
        Point(0, "write run/metrics.jsonl", nth=6, what="job"),
        Point(0, "remove old step/manifest.json"),
    ):
        assert launch.counts()[point.rank, point.phase] >= point.nth
        campaign.kill(point)
    assert campaign.kills == 6
    campaign.end()


# ------------------------------------------------------------------------------------------------------- told to stop


def stop(place: Place, point: Point, more: tuple[str, ...] = ()) -> Launch:
    """Start the run; the launcher gets a SIGTERM at ``point``."""
    launch = place.launch(attrs.evolve(point, what="stop"), more=more)
    assert launch.struck, point
    place.assert_nothing_lost()
    return launch


def stop_and_see(place: Place, *points: Point, more: tuple[str, ...] = ()) -> None:
    """At each of ``points``: it is saved, and goes on."""
    for point in points:
        launch = stop(place, point, more)
        assert launch.code == 75, (point, launch.err)
        said = re.findall("stopped by a signal after step ([0-9]+), saved; continue with --resume", launch.out)
        status = json.loads((place.run() / "status.json").read_text())
        assert [status["step"]] == [int(step) for step in said]
        assert status["status"] == "preempted"
        assert verify(place.run() / f"checkpoints/step_{status['step']:06d}") == ""


def test_told_to_stop_a_few_times(short: tuple[Path, Place, Launch], tmp_path: Path) -> None:
    """While the tokenizer is trained, in a collective of a step, while saving, in an evaluation."""
    file, whole, _ = short
    place = Place(file, tmp_path / "stopped")
    launch = stop(place, Point(0, "read to train the tokenizer", nth=50))
    assert launch.code == 75  # at once, before training
    stop_and_see(
        place,
        Point(1, "reduce_scatter in a step", nth=4),
        Point(0, "save new step/model.safetensors"),
        Point(0, "all_reduce in an evaluation", nth=4),
    )
    assert place.launch().code == 0
    place.assert_ended_like(whole.run(), stopped=True)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
def test_told_to_stop_in_every_part_of_saving_and_evaluating(tmp_path: Path, asynchronous: bool) -> None:
    file, whole, launch = uninterrupted(tmp_path, asynchronous, steps=240)
    place = Place(file, tmp_path / "stopped")
    phases = [
        (rank, phase)
        for rank, phase in launch.counts()
        if re.match("save |fsync|write new step|rename check|remove|barrier in saving|.* in an eval|evaluate", phase)
        and "tokenizer" not in phase
        and (rank, phase) not in early(launch)
    ]
    # the first status is written before training begins; evaluations come when a step is saved
    phases.sort(key=lambda key: ("old step" in key[1], "eval" in key[1]))
    stop_and_see(place, *[Point(rank, phase, nth=2 if "status" in phase else 1) for rank, phase in phases])
    assert place.launch().code == 0
    place.assert_ended_like(whole.run(), stopped=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_told_to_stop_while_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is followed after the step that compiles."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # here, not in processes of their own
    file = write_killed(tmp_path, steps=6, asynchronous=False)
    compiled = ("--set", "train.compile=true")
    place, whole = Place(file, tmp_path / "stopped"), Place(file, tmp_path / "whole")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    stop_and_see(place, Point(0, "compile"), more=compiled)
    assert place.launch(more=compiled).code == 0
    assert whole.launch(more=compiled).code == 0
    assert_same_end(place.run(), whole.run())
