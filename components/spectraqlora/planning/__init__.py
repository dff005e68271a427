"""How much memory every step takes."""
