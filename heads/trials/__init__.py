"""Odd-one-out trials."""
