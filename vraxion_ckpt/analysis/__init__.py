"""Inspect, check and compare checkpoints; expert load.

May import: `reading`, `plugins`, `experts`, `optimizer`, `checkpoint`, `commit`, `support`.
"""
