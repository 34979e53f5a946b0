"""Tokenizer ``bpe``: byte-level BPE, trained with rustbpe; tiktoken encodes."""
