"""Views of the store for people: charts, the report, MLflow. Each can be lost and rebuilt; the search reads none."""
