"""The command line: serve, pull, chat, files, train, jobs, adapters, tenants, keys."""
