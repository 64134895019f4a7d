"""The Hub, or what of it is cached: found out at once."""

import os
import ssl
from functools import cache
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from huggingface_hub import constants

SECONDS = 5.0


@cache
def hub_is_reachable() -> bool:
    """Whether the Hub answers; asked once per process, without retries."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=SECONDS).close()
    except HTTPError:  # an answer
        return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the Hub's libraries may know other certificates
    except TimeoutError:
        return False
    return True


def hub_or_cache() -> None:
    """Before something is loaded by its Hub id: without a network, the Hub's libraries look into their cache at once.

    By themselves they retry for 24 seconds.
    """
    if not hub_is_reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are not imported yet
        constants.HF_HUB_OFFLINE = True
