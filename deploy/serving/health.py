"""Whether a server answers on this machine."""

import urllib.request
from http.client import HTTPException

# A proxy named in the environment must not be asked for this machine's own server.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def url_of(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  (asks, does not listen)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def healthy(url: str) -> bool:
    """Whether the server answers that it can work."""
    try:
        with _direct.open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, HTTPException):  # not listening yet, an engine that has died (503), or another kind of server
        return False
