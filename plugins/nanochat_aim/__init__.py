"""Logger ``aim``: an Aim repository, on disk or behind a server."""
