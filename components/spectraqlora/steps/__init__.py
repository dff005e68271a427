"""The steps of the pipelines; each knows artifacts, and no other step."""
