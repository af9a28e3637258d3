"""The plugin contract: base classes, hooks, discovery, and every call of a plugin's code.

May import: `formats`, `checkpoint`, `support`.
"""
