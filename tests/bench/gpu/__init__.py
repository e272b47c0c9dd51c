"""`make gpu-check`: the GPU backend's tests on a device, then the benchmark protocol, written to a JSON file."""
