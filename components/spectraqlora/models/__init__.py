"""Models: loading, their linear modules and tensors, adapters."""
