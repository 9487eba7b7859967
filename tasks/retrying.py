"""Retries, only where trying again can help: a server that does not answer now and may in a minute."""

from typing import Any

import httpx
import requests
from mlflow.exceptions import MlflowException
from prefect.client.schemas.objects import State
from prefect.tasks import exponential_backoff

BUSY = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED")
_NETWORK = (ConnectionError, TimeoutError, requests.ConnectionError, requests.Timeout, httpx.TransportError)


def _may_pass(_task: object, _run: object, state: "State[Any]") -> bool:
    """Whether the failure is the network's or the server's, not the request's."""
    error = state.data
    return isinstance(error, _NETWORK) or (isinstance(error, MlflowException) and error.error_code in BUSY)


ON_NETWORK_FAULTS: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": exponential_backoff(10),
    "retry_condition_fn": _may_pass,
}
