"""Shards: encoded frames, sound and facts of clips, ready for training."""
