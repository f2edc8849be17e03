"""What a call costs before it computes anything: the functions that it enters."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable


def functions_entered(call: Callable[[], object]) -> Counter[str]:
    """Count the functions entered in a call: "call" those of Python, itself too, "c_call" of C."""
    events: Counter[str] = Counter()
    gc.disable()  # it calls finalizers of others, and Hypothesis' callback
    sys.setprofile(lambda frame, event, _: events.update([event]))
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return events
