"""Is the Hugging Face hub there? Asked once and briefly: a machine without a network must not wait for retries."""

import threading
from functools import cache

from huggingface_hub import constants, get_session

PROBE_SECONDS = 5.0


@cache
def hub_unreachable() -> str:
    """Why the hub cannot be used: one line, or "" where it can. Asked once a process, answered within PROBE_SECONDS."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    answer: list[str] = []

    def ask() -> None:
        try:
            response = get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS, follow_redirects=True)
            # Mirrors need not serve their root (404), but a proxy that refuses or a server in trouble is no hub.
            refused = response.status_code in (401, 403, 407) or response.status_code >= 500
            answer.append(f"the hub answers with status {response.status_code}" if refused else "")
        except Exception as error:  # whatever stands between: DNS, proxy, certificates
            answer.append(f"the hub does not answer ({type(error).__name__})")

    # A thread, since the HTTP client's limit does not cover the look-up of the name, which can hang for minutes.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    return answer[0] if answer else f"the hub does not answer within {PROBE_SECONDS:g} s"
