"""RMS norms of groups of channels, gated or not, and norms of keys."""
