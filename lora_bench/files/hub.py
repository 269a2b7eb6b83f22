"""Reachability of the Hugging Face hub, tested once per process."""

from __future__ import annotations

from functools import cache

_TIMEOUT_SECONDS = 5


@cache
def is_reachable() -> bool:
    """Return whether the hub answers within 5 seconds, with any status; if not, switch its libraries to offline mode.

    Without offline mode they retry each request for half a minute and print messages. Downloaded files are still found
    in their cache. False, without a request, if they are offline already; the result is cached for the process.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
    except Exception:  # the errors of its HTTP client, whichever that is
        constants.HF_HUB_OFFLINE = True
        return False
    return True
