"""What the user is shown of a result: pure functions of results."""
