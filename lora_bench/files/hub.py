"""The Hugging Face hub, asked once whether it answers: where it does not, nothing waits for it."""

from __future__ import annotations

from functools import cache

_TIMEOUT_SECONDS = 5


@cache
def is_reachable() -> bool:
    """Whether the hub answers; if not, the libraries are switched to their offline mode.

    Otherwise each of their requests is tried for half a minute, and says so on the screen. What was downloaded before
    is still found in their cache.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
    except Exception:  # of whichever HTTP client the hub's library uses
        constants.HF_HUB_OFFLINE = True
        return False
    return True
