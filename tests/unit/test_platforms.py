"""Where nanochat does not run, it says so."""

from __future__ import annotations

import subprocess
import sys


def test_windows_is_told_what_to_do() -> None:
    code = "import sys; sys.platform = 'win32'; import nanochat_core"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: nanochat runs on Linux and macOS; on Windows install and start it in WSL" in done.stderr
