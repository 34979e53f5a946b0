"""Logger ``console``: one line per step, and a progress bar on a terminal."""
