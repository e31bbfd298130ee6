"""The matrix recurrence in compiled code on the CPU."""
