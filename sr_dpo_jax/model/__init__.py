"""One decoder for every family: architecture -> attention -> decoder, read in that order."""
