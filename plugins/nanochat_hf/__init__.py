"""Model and tokenizer ``hf``: a causal language model of the library transformers, for evaluation."""
