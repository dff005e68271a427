"""Running a pipeline on Kubeflow Pipelines."""
