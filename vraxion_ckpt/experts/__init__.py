"""Clone, remove and rename experts, and update all state that belongs to them.

May import: `checkpoint`, `optimizer`.
"""
