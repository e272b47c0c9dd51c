"""Who computes a base's steps: chosen once, when the base is loaded (`choice`), a file for each."""
