"""Where text becomes tokens: threads that tenants share fairly."""
