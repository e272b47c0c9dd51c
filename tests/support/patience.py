"""How long a test waits for what it knows will come."""

from __future__ import annotations

PATIENCE = 1200.0
"""Seconds. Long enough for any machine: a wait ends with it only if what it waits for will never come."""
