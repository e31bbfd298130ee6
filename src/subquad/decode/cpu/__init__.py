"""One token on the CPU: traced once from the layers' own code, then run in one call."""
