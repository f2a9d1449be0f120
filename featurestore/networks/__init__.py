"""The frozen networks: what they are called, how they are built, and how their layers are found."""
