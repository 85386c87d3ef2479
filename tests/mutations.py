"""Programs that are nearly right: generated ones, and up to two changes of one action."""

from __future__ import annotations

from hypothesis import strategies as st

from triloom import schedules
from triloom.actions import TRANSFER, Program, replace_ranks
from triloom.passes import add_communication, add_recompute

CHANGES = ("drop", "copy", "move", "rank", "microbatch", "op", "stage", *("near", "swap") * 3)


@st.composite
def mutated(draw: st.DrawFn) -> Program:
    """A generated program with transfers, and up to two changes of one action."""
    name = draw(st.sampled_from(sorted(schedules.NAMED)))
    p, m = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    program = schedules.NAMED[name](p, m)
    if draw(st.booleans()) and name != "forward":
        program = add_recompute(program)
    program = add_communication(program, draw(st.integers(0, 2)))
    rows = [list(row) for row in program.ranks]
    for change in draw(st.lists(st.sampled_from(CHANGES), max_size=2)):
        row = rows[draw(st.integers(0, p - 1))]
        if not row:
            continue
        i = draw(st.integers(0, len(row) - 1))
        a = row[i]
        near = lambda top: draw(st.integers(0, top))  # noqa: E731
        if change == "swap":
            writes = [k for k, other in enumerate(row) if other.op in ("W", "BW")] or [i]
            i, j = (draw(st.sampled_from(writes)) for _ in range(2))
            row[i], row[j] = row[j], row[i]
        elif change == "copy":
            row.insert(near(len(row)), a)
        elif change == "microbatch":
            row[i] = a._replace(microbatch=near(m))
        elif change == "op":
            row[i] = a._replace(op=draw(st.sampled_from(("F", "BW", "B", "W") if a.op not in TRANSFER else TRANSFER)))
        elif change == "stage":
            row[i] = a._replace(subject=a.subject._replace(index=near(len(program.stages) - 1)))
        else:
            del row[i]
            if change == "move":
                row.insert(near(len(row)), a)
            elif change == "near":
                row.insert(max(0, min(len(row), i + near(6) - 3)), a)
            elif change == "rank":
                other = rows[near(p - 1)]
                other.insert(near(len(other)), a)
    return replace_ranks(program, rows)
