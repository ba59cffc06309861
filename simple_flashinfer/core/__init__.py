"""What to run next, and which pages it owns. Pure Python and numpy: imports no torch, so it can be simulated."""
