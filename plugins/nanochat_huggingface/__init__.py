"""A tokenizer.json, read by the library tokenizers."""
