"""The base classes and hooks of plugins, their discovery, and every call of a plugin's code.

May import: `formats`, `checkpoint`, `support`.
"""
