"""From raw files to shards."""
