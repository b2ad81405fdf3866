"""Steps that are done once, whatever dies: leases, attempts, the driver, a step's MLflow run."""
