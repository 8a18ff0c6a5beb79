"""Starting a planned run, on this machine or over MPI, and listening to it."""
