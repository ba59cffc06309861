"""`simple-flashinfer bench`: how fast the engine is here, and how far that is from what the machine could do."""
