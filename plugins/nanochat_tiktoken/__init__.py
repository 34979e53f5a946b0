"""Tokenizer ``tiktoken``: published encodings, from tiktoken's cache or a file."""
