"""Recipes: a conversion written down in YAML.

May import: `conversion` and every room that `conversion` may import.
"""
