"""Whatever a plugin raises, prints or changes when it is called or imported is told as its failure, or is put back."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from pathlib import Path

import pytest
from helpers.support import Site, call

from nanochat_core import DataError, PluginError
from nanochat_core.distributed.signals import Interrupted, Stopped, interruptible_command
from nanochat_core.plugins import calls
from nanochat_core.plugins.calls import blame, describe, importing, plugin_call
from nanochat_core.plugins.discovery import load_plugins


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Odd(BaseException):
    pass


FAILURES = [SystemExit(0), SystemExit(3), GeneratorExit(), Odd("odd"), Mute(), RecursionError("deep"), StopIteration()]


@pytest.mark.parametrize("raised", FAILURES, ids=lambda error: type(error).__name__)
def test_whatever_a_plugin_raises_is_its_failure(raised: BaseException) -> None:
    told = rf"^model 'm' failed: {type(raised).__name__}.*test_calls.py:\d+\)$"
    with pytest.raises(PluginError, match=told), plugin_call("model 'm' failed"):
        raise raised


def test_a_keyboard_interrupt_of_a_plugin_is_no_ctrl_c() -> None:
    with interruptible_command(), pytest.raises(PluginError, match="KeyboardInterrupt"), plugin_call("it failed"):
        raise KeyboardInterrupt
    with interruptible_command(), pytest.raises(Interrupted), plugin_call("it failed"):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("raised", [Stopped(), DataError("no data"), RuntimeError("CUDA out of memory")])
def test_requests_to_stop_and_errors_for_users_pass(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, plugin_call("it failed"):
        raise raised
    assert caught.value is raised


def test_a_description_is_one_printable_line() -> None:
    text = describe(ValueError("a\n\x1b[2J" + "b" * 5000))
    assert text.isprintable()
    assert len(text) < 1000


def test_only_what_comes_out_of_a_foreign_plugin_is_blamed_on_it(site: Site) -> None:
    site.add("made-up", "def run(): raise ZeroDivisionError('theirs')\n")
    import made_up.plugin  # type: ignore[import-not-found]

    with pytest.raises(ZeroDivisionError) as theirs:
        made_up.plugin.run()
    failure = blame(theirs.value)
    assert failure is not None
    assert str(failure).startswith("plugin 'made_up' of made-up 1.0 failed: ZeroDivisionError: theirs")
    assert blame(ValueError("ours")) is None


IMPORTS = {
    "print": "print('I am printed')",
    "exit": "import sys; sys.exit(0)",
    "interrupt": "raise KeyboardInterrupt",
    "base": "class Odd(BaseException): pass\nraise Odd('odd')",
    "mute": "class Mute(Exception):\n    def __str__(self): raise RuntimeError\nraise Mute()",
    "deep": "def f(): f()\nf()",
}
REGISTER = "\n@hookimpl\ndef nanochat_register_loggers(registry): registry.add('mine', config=Config, factory='a:b')\n"


@pytest.mark.parametrize("what", IMPORTS)
def test_an_import_that_fails_takes_nothing_along(site: Site, tiny: Path, what: str) -> None:
    site.add("made-up", IMPORTS[what] + REGISTER)
    result = call("show", tiny)
    assert result.code == 0, result.err
    assert "I am printed" not in result.out
    assert "model.depth" in result.out or "[model]" in result.out
    listed = call("plugins", "--check")
    assert ("plugin 'made_up' of made-up failed to load" in listed.err) == (what != "print")


def test_what_an_import_changes_is_put_back(site: Site) -> None:
    site.add(
        "made-up",
        "import os, sys, signal\nos.chdir('/')\nsys.path.clear()\nsys.path.append('/mine')\nos.environ.clear()\n"
        "os.environ['MINE'] = '1'\nsys.stdout.close()\nsys.stdout = None\nsys.setrecursionlimit(10**4)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + REGISTER,
    )
    before = (Path.cwd(), list(sys.path), dict(os.environ), sys.stdout, sys.getrecursionlimit())
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert not load_plugins().failures
        assert before[0] == Path.cwd()
        assert sys.path == [*before[1], "/mine"]
        assert dict(os.environ) == {**before[2], "MINE": "1"}
        assert (sys.stdout, sys.getrecursionlimit()) == before[3:]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        sys.path[:] = before[1]
        os.environ.pop("MINE", None)


def test_an_import_that_does_not_end_is_named_and_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "SLOW_SECONDS", 0.01)
    monkeypatch.setattr(calls, "MOST_SECONDS", 0.5)
    site.add("made-up", "while True: pass\n")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        (failure,) = load_plugins("made_up").failures
    assert "its import took longer than 0.5 s" in str(failure)
    assert "loading plugin 'made_up' of made-up takes long" in said.getvalue()


def test_ctrl_c_names_the_plugin_that_is_imported() -> None:
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        interruptible_command(),
        pytest.raises(Interrupted),
        importing("plugin 'slow' of made-up"),
    ):
        signal.raise_signal(signal.SIGINT)
    assert said.getvalue() == "interrupted while loading plugin 'slow' of made-up\n"


COMMANDS = """
@hookimpl
def nanochat_register_commands(cli):
    for name in ("", "a b", "-x", "A", "x" * 300, "%s", None, 5):
        try: cli.add(name, module="a.b", summary="x")
        except Exception as error: assert type(error).__name__ == "PluginError", error
        else: assert False, name
    for summary in ("", None, "two\\nlines"):
        try: cli.add("fine", module="a.b", summary=summary)
        except Exception as error: assert type(error).__name__ == "PluginError", error
        else: assert False, summary
    cli.add("percent", module="made_up.command", summary="100% %(nothing)s")
"""
COMMAND = """
import sys
def add_arguments(parser): parser.add_argument("what")
def main(options, arguments):
    match options.what:
        case "none": return None
        case "exit": sys.exit(7)
        case "text": return "x"
        case "raise": 1 / 0
"""


def test_commands_are_checked_when_they_are_registered(site: Site) -> None:
    site.add("made-up", COMMANDS)
    (site.directory / "made_up" / "command.py").write_text(COMMAND)
    plugins = load_plugins()
    assert not plugins.failures
    assert [command.name for command in plugins.commands] == ["percent"]
    assert "100% %(nothing)s" in call("--help").out
    assert [call("percent", what).code for what in ("none", "exit", "text", "raise")] == [0, 7, 2, 2]
    failed = call("percent", "raise").err
    assert failed.startswith("command 'percent' of a plugin (made_up.command) failed: ZeroDivisionError")


@pytest.mark.parametrize(
    "arguments",
    ["'a/b', config=Config, factory='a:b'", "'', config=Config, factory='a:b'", "'a', config=Config, factory=None",
     "None, config=Config, factory='a:b'", "'a', config=Config, factory='a:b', summary=None",
     "'a', config=Config, factory='a:b', requires='torch'", "'a', config=Config, factory='a:b', defaults=['x']"],
)  # fmt: skip
def test_entries_are_checked_when_they_are_registered(site: Site, arguments: str) -> None:
    site.add("made-up", f"@hookimpl\ndef nanochat_register_loggers(registry): registry.add({arguments})\n")
    (failure,) = load_plugins("made_up").failures
    assert failure.reason.startswith("PluginError"), failure
