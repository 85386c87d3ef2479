"""What one rank runs: ``python -m harness.child SPEC.json``.

The ranks of a test file run pytest itself, on the same cases in the same order, so that parameters, fixtures and
assertion messages are what they are in any other test.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .plugin import SESSION
from .session import RankSession

QUIET = ["-p", "no:cacheprovider", "-p", "no:threadexception", "-p", "no:unraisableexception", "-p", "no:faulthandler"]
"""Off: what would write into the checkout, and what would take over the exception hooks of triloom.boot."""


class Reporter:
    """pytest plugin of a rank: runs the wanted cases in the parent's order and reports each."""

    def __init__(self, session: RankSession, timeouts: dict[str, float]) -> None:
        self._session = session
        self._timeouts = timeouts
        self._phases: list[pytest.TestReport] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[SESSION] = self._session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        missing = [key for key in self._timeouts if key not in found]
        if missing:
            raise pytest.UsageError(f"rank {self._session.world.rank} does not find {missing}: ids must not vary")
        items[:] = [found[key] for key in self._timeouts]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._session.write(event="broken", text=report.longreprtext)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._phases = []
        with self._session.case(item.nodeid, self._timeouts[item.nodeid]) as outcome:
            result = yield
            outcome |= summary(self._phases)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._phases.append(report)


def summary(phases: list[pytest.TestReport]) -> dict[str, Any]:
    """One outcome from set-up, call and tear-down."""
    failed = [phase for phase in phases if phase.failed]
    skipped = [phase for phase in phases if phase.skipped]
    if failed:
        text = "\n".join(phase.longreprtext for phase in failed)
        captured = "".join(f"\n--- {name} ---\n{content}" for name, content in failed[-1].sections if content.strip())
        return {"outcome": "failed", "text": text + captured, "failed_at": failed[0].stop}
    if skipped:
        reason = skipped[0].longrepr
        return {"outcome": "skipped", "text": reason[2] if isinstance(reason, tuple) else str(reason)}
    return {"outcome": "passed"}


def run_tests(session: RankSession, folder: Path, spec: dict[str, Any]) -> None:
    """The selected tests of one file."""
    basetemp = folder / f"tmp{session.world.rank}"
    arguments = [spec["file"], "--rootdir", spec["root"], "--basetemp", str(basetemp)]
    arguments += ["-p", "harness.plugin", "--runxfail", "--capture=sys", "--color=no", "-q", "-m", "", *QUIET]
    pytest.main(arguments, plugins=[Reporter(session, spec["timeouts"])])


def load(target: str) -> Callable[..., Any]:
    """``path/to/file.py:function``"""
    path, _, name = target.partition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


def run_shipped(session: RankSession, folder: Path, spec: dict[str, Any]) -> None:
    """``function(world, case)`` for every case that was shipped."""
    function = load(spec["target"])
    for key, timeout in spec["timeouts"].items():
        with session.case(key, timeout) as outcome:
            try:
                with session.fresh_world() as world:
                    outcome |= {"outcome": "passed", "value": function(world, spec["cases"][key])}
                    json.dumps(outcome["value"])
            except Exception:
                outcome.clear()
                outcome |= {"outcome": "failed", "text": traceback.format_exc()}


MODES = {"tests": run_tests, "ship": run_shipped}


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text())
    folder = Path(path).parent
    session = RankSession(folder, spec["deadline"])
    MODES[spec["mode"]](session, folder, spec)
    session.close()


if __name__ == "__main__":
    main(sys.argv[1])
