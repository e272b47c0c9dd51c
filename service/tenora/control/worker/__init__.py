"""What takes a job from its files to its adapter."""
