"""Checkpoints as folders of .npy files, and addresses handed from expert to expert."""
