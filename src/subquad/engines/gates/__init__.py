"""Gated products and forget gates."""
