"""The kinds of adapters: what each one's files hold, which weights they become, and how they are written."""
