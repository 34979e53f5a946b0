"""Byte-level BPE: rustbpe trains, tiktoken encodes."""
