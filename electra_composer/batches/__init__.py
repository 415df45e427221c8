"""Shards to batches: streams, reader, dataset and loader workers."""
