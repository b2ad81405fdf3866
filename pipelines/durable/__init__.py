"""Durable steps: a step runs once, whatever process dies. Leases, attempts, the workflow runner, MLflow runs of steps."""
