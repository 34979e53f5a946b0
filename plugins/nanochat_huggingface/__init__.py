"""Tokenizer ``huggingface``: a tokenizer.json, read by the library tokenizers."""
