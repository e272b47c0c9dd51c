"""How many learners a job has, and in what order they run."""
