"""The matrix recurrence: one state [K,V] a head; every decay, every erase."""
