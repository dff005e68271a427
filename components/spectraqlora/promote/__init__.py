"""The promote step."""
