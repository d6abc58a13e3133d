"""Crash-safe files and verified reads: checkpoints, and directories of cut models."""
