"""Published encodings of tiktoken, from its cache or a file."""
