"""What compiled code stands on: threads, values, vectors, memory, and the cache of what was compiled."""
