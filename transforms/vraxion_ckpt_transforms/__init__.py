"""The transforms that ship with vraxion-ckpt: one module for each."""
