"""Progress on the flow run's page."""

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact


class Progress:
    """The progress artifact, as long as Prefect responds: hours of work must not end for want of a picture."""

    def __init__(self, key: str, description: str) -> None:
        self._logger, self._shown = get_run_logger(), True
        self._artifact = create_progress_artifact(0.0, key=key, description=description)

    def show(self, percent: float) -> None:
        """Move it to so many percent."""
        if not self._shown:
            return
        try:
            update_progress_artifact(self._artifact, percent)  # type: ignore[arg-type]
        except httpx.HTTPError as error:
            self._shown = False  # each try takes Prefect's client a minute
            self._logger.warning("Prefect does not answer (%s): the work continues without showing progress", error)
