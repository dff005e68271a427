"""The start-point step."""
