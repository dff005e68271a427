"""The detect-changes step."""
