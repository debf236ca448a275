"""What engine.report draws with matplotlib: a function a figure, from data and a width to a Figure."""
