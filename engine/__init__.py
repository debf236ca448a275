"""Learn video representations from unlabelled video, and evolve the loss that learns them."""

__version__ = "0.1.0"
