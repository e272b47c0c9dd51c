"""From a request to text: prompts, generation, stop strings, scoring."""
