"""From networks and clips to vectors, and from vectors to numbers and files."""
