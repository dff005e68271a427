"""All that talks to MLflow: runs, live metrics, the model registry."""
