"""What is made of the hidden states after the last layer: scores, a loss for each, and its gradient. A file each."""
