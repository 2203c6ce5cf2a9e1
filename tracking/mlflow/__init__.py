"""A study in MLflow, and MLflow's page over it."""
