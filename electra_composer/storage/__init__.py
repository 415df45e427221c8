"""Format of a folder of shards; object stores."""
