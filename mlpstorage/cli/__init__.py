"""Command-line parsing: argparse only, one module a command."""
