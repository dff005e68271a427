"""Rows in batches, losses, held-out rows, and the noise of comparisons."""
