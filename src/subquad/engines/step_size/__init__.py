"""Selective step sizes, from the projected step to values and decay."""
