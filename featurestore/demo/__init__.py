"""Demo faces, rendered."""
