"""The projection of one token."""
