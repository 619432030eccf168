"""Tests that would begin too late for `.ci/run` are skipped."""

import time

import pytest

from conftest import pytest_runtest_setup


def test_what_begins_too_late_is_skipped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTS_BEGIN_BEFORE", str(time.time() + 60))
    pytest_runtest_setup(request.node)
    monkeypatch.setenv("TESTS_BEGIN_BEFORE", str(time.time() - 1))
    with pytest.raises(pytest.skip.Exception, match="time limit"):
        pytest_runtest_setup(request.node)
    monkeypatch.delenv("TESTS_BEGIN_BEFORE")
    pytest_runtest_setup(request.node)
