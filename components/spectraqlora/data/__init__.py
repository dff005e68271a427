"""Data sources and row layouts."""
