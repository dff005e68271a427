"""The select-layers step."""
