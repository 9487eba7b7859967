"""Is the Hugging Face hub there, and if it does not give something, why? Said at once, in one line.

Asked once and briefly: a machine without a network must not wait for retries.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from huggingface_hub import constants, errors, get_session

PROBE_SECONDS = 5.0


@cache
def hub_obstacle() -> str:
    """What keeps the hub from being used, in one line; "" where it can. Probed once per process, for PROBE_SECONDS."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    outcome: list[str] = []

    def ask() -> None:
        try:
            response = get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS, follow_redirects=True)
            # Mirrors need not serve their root (404), but a proxy that refuses or a server in trouble is not a hub.
            refused = response.status_code in (401, 403, 407) or response.status_code >= 500
            outcome.append(f"the hub answers with status {response.status_code}" if refused else "")
        except Exception as error:  # whatever stands between: DNS, proxy, certificates
            outcome.append(f"the hub does not answer ({type(error).__name__})")

    # A thread, since the HTTP client's limit does not cover the look-up of the name, which can hang for minutes.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    return outcome[0] if outcome else f"the hub does not answer within {PROBE_SECONDS:g} s"


@contextmanager
def asking(repo: str, revision: str = "") -> Iterator[bool]:
    """Around calls of the hub's client. Yields whether only its cache can answer.

    Raises:
        FileNotFoundError: in place of whatever the client raises: one line, with the remedy.
    """
    unreachable = hub_obstacle()
    try:
        yield bool(unreachable)
    except Exception as error:  # the hub's errors and the HTTP client's share no class
        lacking = f"the hub cannot be reached ({unreachable}); its cache lacks files of {repo}"
        raise FileNotFoundError(lacking if unreachable else _why_not(error, repo, revision)) from None


def _why_not(error: Exception, repo: str, revision: str) -> str:
    match error:
        case errors.GatedRepoError():
            return f"{repo} is gated: accept its licence on its page, then set HF_TOKEN to a token of that account"
        case errors.RepositoryNotFoundError():
            return f"the hub has no {repo}, or it is private and HF_TOKEN is not set to a token that may read it"
        case errors.RevisionNotFoundError():
            return f"{repo} has no revision {revision}: name a branch, a tag or a full commit hash"
        case errors.HfHubHTTPError(response=response) if response.status_code == 401:
            return "the hub does not accept HF_TOKEN (status 401): set a valid token, or unset it"
        case errors.HfHubHTTPError(response=response):
            passing = response.status_code in (408, 429) or response.status_code >= 500
            later = ": try again later, or set HF_HUB_OFFLINE=1 to use what is in the cache" if passing else ""
            return f"the hub answers with status {response.status_code} for {repo}{later}"
        case errors.HFValidationError():
            return f"{repo} is not a name that the Hub allows; it must be org/name"
        case errors.LocalEntryNotFoundError() if isinstance(error.__cause__, Exception):
            return _why_not(error.__cause__, repo, revision)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
