"""Kernels for CPUs, compiled by Numba at the first call: no compiler is needed where they run."""
