"""The cross-entropy of labels."""
