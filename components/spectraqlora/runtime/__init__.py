"""What every step runs in: its decorator, its command line, its console, its limits."""
