"""Measured exponents: how time and memory of one layer grow."""
