"""Bind numbered optimizer state to parameter names, and order the parameters of a changed model.

May import: `checkpoint`.
"""
