"""The only modules that read and write torch and safetensors files, and how checkpoints are laid out in them.

May import: `checkpoint`, `optimizer`, `support`.
"""
