"""The low-rank ops on a GPU, in Triton. `backend` is the entry point for `ops`, `context` the one for an engine."""
