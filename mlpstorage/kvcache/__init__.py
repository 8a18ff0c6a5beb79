"""The KV-cache benchmark: workload, prefix index, tiers, engine, and the program of one rank."""
