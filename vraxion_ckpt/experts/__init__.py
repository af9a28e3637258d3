"""Clone, remove and rename experts, with all state that belongs to them.

May import: `checkpoint`, `optimizer`.
"""
