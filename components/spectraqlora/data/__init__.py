"""Rows as people have them, on their way to token ids: used by prepare-data, and by the checks before a run.

sources (files and loaders) -> layouts (which columns) -> conversations (a row's messages) -> rendering (token ids
and labels) -> splits (train and held-out rows) -> packing.
"""
