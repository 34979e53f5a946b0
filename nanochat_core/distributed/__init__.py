"""Processes that train together: the ranks, their store, failures, signals and the launcher."""
