"""Detect a checkpoint's format, open it, and bind its optimizer.

May import: `plugins`, `optimizer`, `checkpoint`, `commit`.
"""
