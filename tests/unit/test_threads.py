"""A short spin of OpenMP threads, unless the user has set another one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ddsr_core.threads import shorten_spin


@pytest.fixture
def no_settings(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that monkeypatch restores it
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def test_threads_spin_shortly(no_settings):
    shorten_spin()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "5"), ("OMP_WAIT_POLICY", "ACTIVE")])
def test_the_users_own_setting_stays(no_settings, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    shorten_spin()
    assert os.environ[name] == value
    assert os.environ.get("GOMP_SPINCOUNT") == (value if name == "GOMP_SPINCOUNT" else None)


def test_importing_the_package_sets_it_before_torch_is_there():
    code = "import sys, os, ddsr_core; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1000"]
