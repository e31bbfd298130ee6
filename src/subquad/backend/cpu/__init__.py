"""Compiled code on the CPU: how it is compiled, its threads, vectors, products and tape."""
