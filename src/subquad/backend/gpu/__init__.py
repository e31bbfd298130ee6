"""Triton on a GPU: launches, their cache, captured graphs."""
