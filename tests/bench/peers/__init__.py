"""Tenora beside vLLM, PEFT and llama.cpp: same machine, same base, same adapters, one run."""
