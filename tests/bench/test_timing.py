"""Timing in turn, memory of a process of its own, and what becomes of cases that fail."""

from __future__ import annotations

import functools
import time

import pytest
import torch

from vizattn.bench import Case, Unavailable, Work, measure
from vizattn.bench.children import in_child
from vizattn.bench.timing import memory_of, time_together


def sleeping(seconds: float) -> Work:
    return Work(functools.partial(time.sleep, seconds), macs=1e6, images=4)


def missing() -> Work:
    raise Unavailable("nothing of the kind is installed")


def broken() -> Work:
    raise RuntimeError("wrong shape\nand more")


def allocating(megabytes: int) -> Work:
    keep = torch.ones(megabytes, 2**18)
    return Work(lambda: (keep + 1).sum(), macs=1.0)


def case(name: str, build: functools.partial[Work] | object, **options: object) -> Case:
    return Case("ops", "sleep", name, build, "forward", dtype="fp32", **options)  # type: ignore[arg-type]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No further process."""
    monkeypatch.setattr("vizattn.bench.timing.in_child", lambda function, *args: function(*args))


def test_times_are_of_one_run_and_all_rounds_count() -> None:
    cases = [case("short", functools.partial(sleeping, 0.002)), case("long", functools.partial(sleeping, 0.01))]
    (short, long), products = time_together(cases, rounds=3, threads=1, least_seconds=0.004)
    assert len(short.seconds) == len(long.seconds) == len(products) == 3
    assert all(0.002 <= a < b for a, b in zip(short.seconds, long.seconds))
    assert min(products) > 1e8 and short.macs == 1e6


def test_rows_have_ratios_to_the_reference_of_the_same_round(here: None) -> None:
    cases = [
        case("unit", functools.partial(sleeping, 0.01), reference=True),
        case("vizattn", functools.partial(sleeping, 0.02), ours=True),
    ]
    [rows] = measure(cases, rounds=3, threads=1, memory=False, context={"machine": "this one"})
    unit, ours = rows
    assert unit.ratio == 1 and 1.3 < (ours.ratio or 0) < 2.7 and ours.reference == "unit"
    assert (ours.ratio_low or 9) <= (ours.ratio or 0) <= (ours.ratio_high or 0)
    assert ours.images_per_second == pytest.approx(4 / (ours.seconds or 1))
    assert ours.gflops == pytest.approx(2e6 / (ours.seconds or 1) / 1e9) and ours.machine == "this one"
    assert ours.run_mb is None and ours.ours and not unit.ours


def test_what_fails_is_said_and_the_rest_is_measured(here: None) -> None:
    cases = [
        case("unit", missing, reference=True),
        case("broken", broken),
        case("vizattn", functools.partial(sleeping, 0.001), ours=True),
    ]
    [rows] = measure(cases, rounds=1, threads=1, memory=False)
    assert [row.note for row in rows] == ["nothing of the kind is installed", "RuntimeError: wrong shape", ""]
    assert rows[0].seconds is None and rows[2].seconds is not None and rows[2].ratio is None


def test_comparisons_are_measured_one_after_the_other(here: None) -> None:
    cases = [case("unit", functools.partial(sleeping, 0.001), size=size, reference=True) for size in ("1x1", "2x2")]
    assert [[row.size for row in rows] for rows in measure(cases, rounds=1, threads=1, memory=False)] == [
        ["1x1"],
        ["2x2"],
    ]


def test_memory_is_that_of_a_process_of_its_own() -> None:
    ballast = torch.ones(300, 2**18)  # of this process: must not show
    found = in_child(memory_of, case("vizattn", functools.partial(allocating, 64)), 1)
    assert found is not None and ballast.shape[0] == 300
    built, run = found
    assert 60 < built < 90 and 60 < run < 90


def test_a_process_that_dies_leaves_a_note() -> None:
    [rows] = measure([case("vizattn", dying, ours=True)], rounds=1, threads=1)
    assert "was killed" in rows[0].note and rows[0].seconds is None


def dying() -> Work:
    import os

    os._exit(9)
