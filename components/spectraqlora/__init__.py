"""SpectraQLoRA: 4-bit fine-tuning that puts LoRA capacity where the signal is."""

__version__ = "0.1.0"
