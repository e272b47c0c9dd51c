"""Answers that stay what they are: the fixed set of `tests.bench.checkouts` on a tiny base, in one process."""
