"""Text to shards: sources, documents, examples, parts and engines."""
