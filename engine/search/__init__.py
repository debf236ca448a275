"""Which losses are trained next, and what came of them."""
