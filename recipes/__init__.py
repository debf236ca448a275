"""Recipes and losses as TOML files, loaded by name through ``engine.recipe``; no code."""
