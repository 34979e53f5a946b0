"""Data sources ``jsonl`` and ``text``: documents from JSON lines and text files, plain or compressed."""
