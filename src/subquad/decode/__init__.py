"""One token at a time without Python in between: the CPU's tape, the GPU's graphs."""
