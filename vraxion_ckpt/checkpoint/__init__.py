"""The canonical checkpoint, and functions that need nothing else.

Model, head, optimizer state, references to tensors, plain data, source files, ring, visits, split plan, comparison,
invariants.
May import: `support`.
"""
