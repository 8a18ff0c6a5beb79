"""What to run: flags, environment and config file resolved into one frozen, checked model."""
