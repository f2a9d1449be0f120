"""Weights in files: formats, layouts, download, conversion."""
