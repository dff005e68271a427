"""What only a GPU can show: correctness on the card, speed and memory at the shapes of an 8B model."""
