"""From raw video files to batches of clips."""
