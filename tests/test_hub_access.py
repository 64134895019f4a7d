"""What is found out about the network before anything is loaded by its Hub id."""

import io
import ssl
from collections.abc import Iterator
from unittest import mock
from urllib.error import HTTPError, URLError

import pytest

from blueberry.training import hub_access


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hub_access.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub_access.hub_is_reachable.cache_clear()
    yield
    hub_access.hub_is_reachable.cache_clear()


@pytest.mark.parametrize(
    ("answer", "reachable"),
    [
        (io.BytesIO(), True),
        (HTTPError("https://hub", 403, "forbidden", None, None), True),
        (URLError(OSError("Name or service not known")), False),
        (URLError(ssl.SSLError("unknown authority")), True),  # the Hub's libraries have certificates of their own
        (TimeoutError(), False),
    ],
)
def test_any_answer_counts_and_one_question_is_asked(answer, reachable, monkeypatch):
    asked = []

    def urlopen(request, timeout):
        asked.append(timeout)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(hub_access, "urlopen", urlopen)
    assert [hub_access.hub_is_reachable() for _ in range(3)] == [reachable] * 3
    assert asked == [hub_access.SECONDS]


def test_without_a_network_the_cache_is_asked_at_once(monkeypatch):
    monkeypatch.setattr(hub_access, "urlopen", mock.Mock(side_effect=URLError("no network")))
    hub_access.hub_or_cache()
    assert hub_access.constants.is_offline_mode()
