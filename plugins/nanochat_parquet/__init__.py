"""Documents from a directory of parquet shards."""
