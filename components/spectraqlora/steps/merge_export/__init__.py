"""The merge-export step."""
