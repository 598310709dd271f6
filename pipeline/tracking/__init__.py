"""The only room that imports MLflow. Importing it makes MLflow quiet, unless the environment says no."""

import os

# Before MLflow is imported: no migration diary, no progress bars, no usage statistics sent anywhere.
for _name, _value in {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}.items():
    os.environ.setdefault(_name, _value)
