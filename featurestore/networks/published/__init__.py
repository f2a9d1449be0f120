"""The published face networks, a file each."""
