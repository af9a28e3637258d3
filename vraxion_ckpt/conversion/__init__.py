"""Convert and edit: run a chain of transforms, verify the result, write and publish it.

May import: `reading`, `plugins`, `experts`, `optimizer`, `checkpoint`, `commit`, `support`.
"""
