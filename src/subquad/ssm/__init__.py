"""Continuous time: where state space models come from, and how they become recurrences."""
