"""Documents from parquet shards: on disk, in an object store, behind URLs, or on the Hugging Face hub."""
