"""pytest plugin: tests marked ``ranks`` run under mpirun, all of one file and rank count in one launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from .cases import Case, run_cases

if TYPE_CHECKING:
    from triloom.boot import World

    from .session import RankSession

SESSION: pytest.StashKey[RankSession] = pytest.StashKey()
"""Set on the ranks only: this process is one of them."""

TIMEOUTS = {"timeout": 60.0, "launch": 120.0, "deadline": 20.0}
"""Options of the marker and their defaults: seconds for a case, for a launch, for a wait of the world's group."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("ranks")
    if marker is None:
        return
    where = metafunc.definition.nodeid
    unknown = [key for key in marker.kwargs if key not in TIMEOUTS]
    if not marker.args or unknown or not all(isinstance(n, int) and n > 0 for n in marker.args):
        raise pytest.UsageError(f"{where}: ranks takes numbers of ranks and {', '.join(TIMEOUTS)}, got {marker}")
    if "world" not in metafunc.fixturenames:
        raise pytest.UsageError(f"{where} is marked ranks, so it must take the `world` fixture")
    metafunc.parametrize("world", marker.args, indirect=True, ids=[f"{n}ranks" for n in marker.args])


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """This rank's World, with a group of its own for this test."""
    session = request.config.stash.get(SESSION, None)
    if session is None:
        raise pytest.UsageError("the `world` fixture is for tests marked @pytest.mark.ranks(...)")
    with session.fresh_world() as fresh:
        yield fresh


class Batches:
    """The parent's side: launches a batch when its first case is asked for, and remembers the outcomes."""

    def __init__(self) -> None:
        self._items: dict[tuple[str, int], list[pytest.Function]] = {}
        self._done: dict[str, Case] = {}

    def add(self, item: pytest.Function) -> None:
        key = (item.nodeid.partition("::")[0], item.callspec.params["world"])
        self._items.setdefault(key, []).append(item)

    def case(self, item: pytest.Function) -> Case:
        if item.nodeid not in self._done:
            file, n = item.nodeid.partition("::")[0], item.callspec.params["world"]
            items = self._items[file, n]
            options = [{**TIMEOUTS, **i.get_closest_marker("ranks").kwargs} for i in items]  # type: ignore[union-attr]
            spec: dict[str, Any] = {
                "mode": "tests",
                "file": str(item.path),
                "root": str(item.config.rootpath),
                "deadline": max(option["deadline"] for option in options),
                "timeouts": {i.nodeid: option["timeout"] for i, option in zip(items, options, strict=True)},
            }
            self._done |= run_cases(n, spec, launch_timeout=max(option["launch"] for option in options))
        return self._done[item.nodeid]


def pytest_collection_finish(session: pytest.Session) -> None:
    if SESSION in session.config.stash:
        return
    batches = Batches()
    for item in session.items:
        if item.get_closest_marker("ranks") is not None and isinstance(item, pytest.Function):
            batches.add(item)
            # Fixtures and body belong to the ranks; here the item only tells what became of it there.
            item.setup = lambda: None  # type: ignore[method-assign]
            item.runtest = lambda item=item: replay(batches.case(item))  # type: ignore[method-assign, misc]


def replay(case: Case) -> None:
    """Pass, skip or fail as the ranks did."""
    __tracebackhide__ = True
    if case.outcome == "skipped":
        pytest.skip(case.text())
    if case.outcome == "failed":
        pytest.fail(case.text(), pytrace=False)
