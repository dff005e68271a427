"""The prepare-data step."""
