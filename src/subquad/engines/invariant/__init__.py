"""Time-invariant recurrences: a step to decode, a convolution to train."""
