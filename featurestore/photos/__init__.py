"""Photographs: found and keyed, decoded, made a network's input, loaded ahead of it."""
