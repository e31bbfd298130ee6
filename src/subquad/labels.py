"""What labels say of a position at which nothing is asked: models, tasks and PyTorch agree."""

IGNORE = -100
