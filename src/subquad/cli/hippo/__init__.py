"""`subquad hippo`: a signal read sample by sample, and what a state of few numbers holds of it."""
