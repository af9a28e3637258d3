"""``python -m vraxion_ckpt.cli``: the commands without the installed script."""

from vraxion_ckpt.cli import main

main()
