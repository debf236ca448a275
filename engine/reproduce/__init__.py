"""The paper's tables and figures, one command each: rows x seeds x columns are cells, each a file of its own."""
