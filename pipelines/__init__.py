"""Commands: each parses, calls and prints. The work is in ``featurestore`` and ``heads``."""
