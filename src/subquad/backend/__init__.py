"""What compiled operations run on: threads and vectors of a CPU, launches and graphs of a GPU."""
