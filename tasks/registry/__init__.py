"""MLflow, without Prefect: client, runs, versions, promotion and its gates."""
