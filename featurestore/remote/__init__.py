"""Stores on an object store: a client of it, a local mirror of a store's small files, a cache of its shards, a writer's lease."""
