"""The control plane: tenants, keys, files, jobs, adapters; the registry and the object store."""
