"""One module per group of routes; each has a `router`. A route checks, calls one use case, and shapes the answer."""
