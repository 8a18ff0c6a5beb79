"""Facts of the hosts that a run uses."""
