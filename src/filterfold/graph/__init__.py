"""Finding the channel groups of a network."""
