"""How much memory and disk every step takes, before anything runs."""
