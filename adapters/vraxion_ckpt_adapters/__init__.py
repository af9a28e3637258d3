"""The formats that ship with vraxion-ckpt: one module or package for each."""
