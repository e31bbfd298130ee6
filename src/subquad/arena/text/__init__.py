"""The arena on text."""
