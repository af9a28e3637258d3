"""Which parameter each entry of an optimizer belongs to, and in which order trainers list them.

Bind numbered optimizer state to parameter names; place the parameters of a changed model.
May import: `checkpoint`.
"""
