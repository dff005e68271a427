"""SpectraQLoRA: 4-bit fine-tuning that puts LoRA capacity where the signal is."""

import os

__version__ = "0.1.0"

# Read when torch is loaded: how often a waiting thread looks before it sleeps. Steps share cores among themselves
# (runtime/threads.py); where other programs want them too, threads that look for long take the time of those that
# work (libgomp's own 300,000: steps of training took up to 40 times as long, with this number up to 10 times), and
# threads that sleep at once or after 1,000 looks cost a free machine half of its speed on small models.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
