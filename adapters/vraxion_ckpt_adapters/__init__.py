"""The formats that ship with vraxion-ckpt, one file each."""
