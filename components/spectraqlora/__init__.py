"""SpectraQLoRA: 4-bit fine-tuning that puts LoRA capacity where the signal is."""

import os

__version__ = "0.1.0"

# Read when torch is loaded: how often a waiting thread looks before it sleeps. Where a step shares its cores, threads
# that look for long take the time of those that work (steps of training took many times as long); threads that
# sleep at once cost a free machine half of its speed on small models.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
