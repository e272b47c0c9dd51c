"""What adapters add to a projection, forward and back."""
