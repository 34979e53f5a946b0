"""Model and tokenizer ``hf``: a causal language model of the library transformers, to be evaluated with our code."""
