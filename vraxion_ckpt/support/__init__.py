"""Strict JSON and YAML, JSON models, signals, progress, checksums, copies between files.

May import: `errors`. Imports without torch.
"""
