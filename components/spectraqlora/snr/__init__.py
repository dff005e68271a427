"""Signal-to-noise ratio of weight matrices, as Spectrum defines it."""
