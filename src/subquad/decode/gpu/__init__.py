"""One token on a GPU: captured once as a CUDA graph, then replayed."""
