"""Where it runs: Ray here or there, clusters and servers of this machine, jobs."""
