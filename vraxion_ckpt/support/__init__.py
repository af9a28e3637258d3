"""Strict JSON and YAML, JSON models, signals, progress.

May import: `errors`. Imports without torch.
"""
