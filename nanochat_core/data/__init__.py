"""From documents to batches: tokenizing, packing into rows, caching and loading."""
