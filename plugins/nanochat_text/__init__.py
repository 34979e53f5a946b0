"""Documents from JSON lines and from text files, plain or compressed."""
