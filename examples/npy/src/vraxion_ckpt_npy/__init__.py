"""Checkpoints as folders of .npy files, and a transform that reassigns addresses."""
