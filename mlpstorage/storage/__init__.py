"""Where blocks are kept: stores, their I/O threads, the payload and its proof, and who owns a directory."""
