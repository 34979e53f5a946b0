"""Tokenizer ``sentencepiece``: trained on the training documents, or a .model file."""
