"""Odd-one-out trials: read, matched to the items of a store by key, restricted by conditions, or made from keys."""
