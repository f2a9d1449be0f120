"""Checkpoint formats, a file each."""
