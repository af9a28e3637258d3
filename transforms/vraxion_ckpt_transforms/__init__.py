"""The transforms that ship with vraxion-ckpt, one file each."""
