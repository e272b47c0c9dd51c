"""The kinds of adapters that are trained: their settings, which rows of the base they fill, how they begin.

A file each.
"""
