"""Tokenizer ``bytes``: bytes as tokens."""
