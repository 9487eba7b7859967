"""Trying again: where the network or a server failed, never where the request was wrong."""

import pytest
import requests
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from prefect.states import Failed

from tasks.retrying import ON_NETWORK_FAULTS

may_pass = ON_NETWORK_FAULTS["retry_condition_fn"]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionError("MLflow at http://127.0.0.1:1 does not answer"), True),
        (requests.ReadTimeout("read timed out"), True),
        (RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "busy"}), True),
        (MlflowException("no such alias", error_code=RESOURCE_DOES_NOT_EXIST), False),
        (FileNotFoundError("no folder nowhere"), False),
        (ValueError("ratio is 2"), False),
        (MemoryError(), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error, again):
    assert may_pass(None, None, Failed(data=error)) is again
