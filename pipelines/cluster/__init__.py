"""Where pipelines run: Ray sessions, local clusters, MLflow and S3 servers of this machine, submitted jobs."""
