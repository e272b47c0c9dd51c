"""`tenora bench`: how fast a running server, its adapters and the kernels of this machine are."""
