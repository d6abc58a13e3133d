"""The clock that calls share, and the spread of what it shows."""

from apt_ext.common import clock


def test_quartiles():
    assert clock.spread([5, 1, 3, 2, 4]) == {"median": 3, "low": 2, "high": 4, "rounds": [5, 1, 3, 2, 4]}
    assert clock.spread([7]) == {"median": 7, "low": 7, "high": 7, "rounds": [7]}


def test_models_take_turns_and_the_device_is_idle_around_each(monkeypatch):
    """On a clock that the calls move: what is left in flight counts for the round that started it."""
    now, flying, order = [0.0], [0.0], []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def synchronize():
        now[0] += flying[0]
        flying[0] = 0.0

    def call(name, seconds):
        order.append(name)
        flying[0] += seconds

    calls = {"before": lambda: call("before", 1.0), "after": lambda: call("after", 0.25)}
    assert clock.in_turn(calls, 3, synchronize) == {"before": [1.0] * 3, "after": [0.25] * 3}
    assert order[4:] == ["before", "after", "after", "before", "before", "after"]
    order.clear()
    monkeypatch.setattr(clock, "_ROUND", 0.9)
    assert clock.in_turn(calls, 1, synchronize)["after"] == [0.25]
    assert order[-5:] == ["before"] + ["after"] * 4  # a round lasts
    order.clear()
    clock.in_turn(calls, 1, synchronize, least=2.0)
    assert order[-10:] == ["before"] * 2 + ["after"] * 8  # as long as the caller says
