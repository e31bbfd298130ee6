"""What compiled operations share: operators, autograd, autocast, explanations, validation."""
