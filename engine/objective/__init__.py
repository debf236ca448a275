"""Tasks, terms and Eq. 1."""
