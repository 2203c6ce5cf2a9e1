"""Views of the store for people: charts, the report, MLflow. Each can be lost and rebuilt; the search reads none."""

from paretune.tracking.charts import front_figure
from paretune.tracking.mlflow_sink import MlflowSink, rebuild, try_drain
from paretune.tracking.picture import front_png
from paretune.tracking.report import report_html, write_report

__all__ = ["MlflowSink", "front_figure", "front_png", "rebuild", "report_html", "try_drain", "write_report"]
