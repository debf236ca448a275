"""One step, one loop: training with a loss."""
