"""Which method, signal and start earn their parameters: a study with several seeds, its raw results, and their tables."""
