"""The matrix recurrence as Triton kernels."""
