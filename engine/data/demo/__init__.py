"""The built-in videos."""
