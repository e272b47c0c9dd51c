"""Tenants, their keys, who is calling and what that caller may do."""
