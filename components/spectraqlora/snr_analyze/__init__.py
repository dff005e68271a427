"""The snr-analyze step."""
