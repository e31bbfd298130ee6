"""Compiled loops for the CPU and Triton kernels for GPUs; each is imported when first used."""
