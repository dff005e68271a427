"""The quantize-load step."""
