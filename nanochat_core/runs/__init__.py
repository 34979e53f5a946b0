"""A run on disk: its directory, ledger, provenance and checkpoints."""
