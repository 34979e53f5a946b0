"""Logger ``console``: one line a step, and a progress bar on a terminal."""
