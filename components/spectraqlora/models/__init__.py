"""Models: loading, 4-bit packing, families, matrices and tensors, adapters; the only place that knows PEFT."""
