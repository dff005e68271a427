"""The re-evaluate step."""
