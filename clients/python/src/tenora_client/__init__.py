"""Python client of the Tenora adapter service."""
