"""Which parts of the photographs a head's choice depends on: attribution maps, and checks of whether they are true."""
