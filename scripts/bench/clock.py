"""Time that passes, measured so that whatever disturbs one contender disturbs all."""

import time
from collections.abc import Callable, Mapping

Times = dict[str, list[float]]


def alternate(contenders: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = 3) -> Times:
    """Return the seconds that each contender takes, in turns: A B C, A B C, ...

    Args:
        contenders: What is timed.
        rounds: How often each is.
        warm_up: Rounds before, in which things are traced and memory is got for the first time.
    """
    seconds: Times = {name: [] for name in contenders}
    for i in range(warm_up + rounds):
        for name, contend in contenders.items():
            began = time.perf_counter()
            contend()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds
