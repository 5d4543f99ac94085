"""What signals do while training: the first asks, the second ends, and afterwards all is as before."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tenfold.train.interrupts import SIGNALS, Interrupts


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        assert not interrupts.asked
        os.kill(os.getpid(), number)
        assert interrupts.asked
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_either_signal_may_be_the_second() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_in_another_thread_signals_stay_as_they_are() -> None:
    before, seen = [signal.getsignal(number) for number in SIGNALS], []

    def run() -> None:
        with Interrupts() as interrupts:
            seen.append((interrupts.asked, [signal.getsignal(number) for number in SIGNALS]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
