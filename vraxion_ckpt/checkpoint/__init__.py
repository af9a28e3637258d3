"""The canonical checkpoint and what can be computed from it alone.

The model and its plain data, the files it was read from, the ring of addresses, visits and the split plan,
comparison and invariants.
May import: `support`.
"""
