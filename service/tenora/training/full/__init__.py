"""Full fine-tuning: the base's own weights are trained, of a copy of it, in a process that serves nobody."""
