"""What the API process needs of the engine. Free of torch."""
