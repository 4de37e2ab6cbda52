import signal

import pytest

from vdm_jax.training.runtime import signals
from vdm_jax.training.runtime.signals import stop_requests


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("default_signals")
def test_a_signal_is_recorded_and_its_duplicate_ignored(signum):
    before = signal.getsignal(signum)
    with stop_requests() as request:
        assert request.signum == 0
        signal.raise_signal(signum)
        signal.raise_signal(signum)
        assert request.signum == signum
        assert signal.getsignal(signum) is not before
    assert signal.getsignal(signum) is before


@pytest.mark.usefixtures("default_signals")
def test_a_later_signal_has_its_default_effect(monkeypatch):
    now = iter([10.0, 10.5, 11.5])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(now))
    with stop_requests() as request:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert request.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so(default_signals):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under `nohup`, or in the background
    with stop_requests() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.signum == 0
