"""Benchmarks that print what they measured: `python -m tests.benchmarks.NAME`."""
