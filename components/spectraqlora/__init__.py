"""SpectraQLoRA: 4-bit fine-tuning that puts LoRA capacity where the signal is."""

import os

__version__ = "0.1.0"

# Read when torch is loaded. Threads that spin while they wait for each other take the time of those that work
# wherever a step shares its cores: there a step of training took 20 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
