"""What differs between the databases that can hold the registry: one file each, behind `dialect.Dialect`."""
