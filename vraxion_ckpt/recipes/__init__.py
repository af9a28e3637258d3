"""Recipes: a conversion written down in YAML.

May import: `conversion` and what that may import.
"""
