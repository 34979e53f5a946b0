"""Helpers that tests share: processes, servers, files and plugins."""
