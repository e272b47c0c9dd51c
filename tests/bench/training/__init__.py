"""Training beside PEFT with a plain torch loop."""
