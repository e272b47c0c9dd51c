"""What crosses HTTP, as pydantic models. Every bound of a request stands here, before anything is allocated for it."""
