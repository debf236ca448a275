"""Recipes and losses as TOML files, loaded by name through ``engine.core.recipe``; no code."""
