"""Running many cases in few launches: one rank's crash or hang costs one case, not the rest of the file."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .launcher import Result, launch

RELAUNCHES = 4
"""How often the rest of a file is launched again after a rank died."""

TAIL = 4000
"""Characters of a dead launch's output that a failure shows."""


@dataclass
class Case:
    """What became of one case: per rank, the end line it reported (None: it did not finish)."""

    ranks: list[dict[str, Any] | None]
    trouble: list[str] = field(default_factory=list)
    """What is wrong beyond the ranks' own reports: a death, a hang, processes left behind."""

    @property
    def outcome(self) -> str:
        outcomes = {line["outcome"] for line in self.ranks if line}
        if self.trouble or "failed" in outcomes:
            return "failed"
        return "skipped" if "skipped" in outcomes else "passed"

    def text(self) -> str:
        """The first failing rank's report in full, one line for each of the others."""
        reports = self._reports()
        failed = sorted((line.get("failed_at", line["time"]), r) for r, line in reports if line["outcome"] == "failed")
        texts = {r: line["text"] for r, line in reports if "text" in line}
        parts = list(self.trouble)
        for place, (_, r) in enumerate(failed):
            first = f"rank {r} of {len(self.ranks)} failed first:\n{texts[r]}"
            parts.append(f"rank {r} then: {gist(texts[r])}" if place else first)
        passed = [r for r, line in reports if line["outcome"] == "passed"]
        if failed and passed:
            parts.append(f"passed on ranks {passed}")
        return "\n".join(parts) or next(iter(texts.values()), "")

    def _reports(self) -> list[tuple[int, dict[str, Any]]]:
        return [(r, line) for r, line in enumerate(self.ranks) if line is not None]


def run_cases(n: int, spec: dict[str, Any], *, launch_timeout: float) -> dict[str, Case]:
    """Run ``spec["timeouts"]`` (case key -> seconds) on ``n`` ranks; every key gets a Case."""
    pending: dict[str, float] = dict(spec["timeouts"])
    done: dict[str, Case] = {}
    for _ in range(1 + RELAUNCHES):
        if not pending:
            break
        with tempfile.TemporaryDirectory(prefix="triloom-ranks-") as temp:
            path = Path(temp, "spec.json")
            path.write_text(json.dumps({**spec, "timeouts": pending}))
            result = launch(n, [sys.executable, "-m", "harness.child", str(path)], timeout=launch_timeout)
            lines = [read_lines(path.with_name(f"{r}.jsonl")) for r in range(n)]
            stacks = [read_text(path.with_name(f"{r}.stacks")) for r in range(n)]
        decided = judge(n, list(pending), lines, stacks, result)
        done |= decided
        pending = {key: seconds for key, seconds in pending.items() if key not in decided}
    for key in pending:
        done[key] = Case([None] * n, [f"not run: {1 + RELAUNCHES} launches of this file died before it"])
    return done


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_text(path).splitlines() if line.endswith("}")]


def read_text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def judge(
    n: int, keys: list[str], lines: list[list[dict[str, Any]]], stacks: list[str], result: Result
) -> dict[str, Case]:
    """The cases that one launch decided: those that ended on every rank, and the one that it died in."""
    ends = [{line["case"]: line for line in mine if line["event"] == "end"} for mine in lines]
    starts = [{line["case"] for line in mine if line["event"] == "start"} for mine in lines]
    done = {key: Case([mine[key] for mine in ends]) for key in keys if all(key in mine for mine in ends)}
    rest = [key for key in keys if key not in done]
    if rest:
        begun = [key for key in rest if any(key in mine for mine in starts)]
        what = death(result)
        if not begun:  # it died before the first of them: none of them can do better alone
            broken = [line["text"] for mine in lines for line in mine if line["event"] == "broken"]
            reason = broken[0] if broken else f"{what} before it\n{output(result)}"
            done |= {key: Case([None] * n, [reason]) for key in rest}
        else:
            key = begun[0]
            missing = [r for r in range(n) if key in starts[r] and key not in ends[r]]
            trouble = [f"{what}; ranks {missing or 'none'} of {n} did not finish this case"]
            trouble += [f"rank {r} was here:\n{last_stack(stacks[r])}" for r in missing if last_stack(stacks[r])]
            done[key] = Case([mine.get(key) for mine in ends], [*trouble, output(result)])
    elif result.returncode or result.timed_out:
        done[keys[-1]].trouble.append(f"{death(result)} after the last case\n{output(result)}")
    if result.leftovers:
        done[next(reversed(done))].trouble.append(f"processes left behind by this launch: {list(result.leftovers)}")
    return done


def death(result: Result) -> str:
    how = "was killed at its deadline" if result.timed_out else f"ended with exit code {result.returncode}"
    return f"the launch {how} after {result.seconds:.1f} s"


MACHINERY = ("/_pytest/", "/pluggy/", "/harness/", "<frozen runpy>")


def last_stack(text: str) -> str:
    """The stacks written during the last case, without the frames that every case has."""
    lines = text.rpartition("\n== ")[2].splitlines()[1:]
    return "\n".join(line for line in lines if not any(part in line for part in MACHINERY)).strip()


def gist(text: str) -> str:
    """The one line of a report that says most: the error itself."""
    lines = text.strip().splitlines()
    return next((line[1:].strip() for line in lines if line.startswith("E  ")), lines[-1])


def output(result: Result) -> str:
    """The end of what the launch printed, without mpirun's banners around it."""
    return f"--- output of the launch ---\n{result.stdout[-TAIL:]}\n{result.stderr[-TAIL:]}".rstrip()
