"""The close-runs step."""
