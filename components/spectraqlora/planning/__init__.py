"""How much memory every step takes, before anything runs."""
