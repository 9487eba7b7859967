"""Addresses and errors of servers as they may be shown: short, without passwords."""

import re
from urllib.parse import urlsplit, urlunsplit

_STATUS = r"\b[45]\d\d (?:Client|Server) Error: [\w ]+(?= for url)"  # of a download; its URL follows


def without_password(uri: str) -> str:
    """``uri`` as it may be shown."""
    parts = urlsplit(uri)
    if parts.password is None and parts.username is None:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def reason(error: Exception, uri: str) -> str:
    """The cause in a few words, without user or password.

    It lies at the end of what requests and SQLAlchemy say, and at the start of what MLflow says.
    """
    text, parts = str(error) or type(error).__name__, urlsplit(uri)
    if match := re.search(rf"\[Errno [^\]]+\] [\w ]+|timed out|Name or service not known|{_STATUS}", text):
        return match[0]
    line = text.splitlines()[0]
    text = line[:400] if type(error).__module__.startswith("mlflow") else line[-160:]
    if parts.password:
        text = text.replace(parts.password, "***")
    if parts.username:  # as a word: a short one is a part of others
        text = re.sub(rf"(?<!\w){re.escape(parts.username)}(?!\w)", "***", text)
    return text
