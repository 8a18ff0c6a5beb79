"""Where blocks are kept: stores, the I/O threads that drive them, the payload and its proof, and who owns a directory."""
