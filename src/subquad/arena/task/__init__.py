"""The arena on a task."""
