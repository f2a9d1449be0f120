"""The store on disk: its format, its shards, reading and writing them. Nothing else knows the files."""
