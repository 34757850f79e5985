"""What showing progress costs: `python -m benchmarks.progress` prints one JSON line.

Times the display alone, per task, on a terminal and in a pipe, and relates it to the shortest
task of a run that is worth a worker (`--task-milliseconds`).
"""

import argparse
import io
import json
import time

from curate.engine.progress import make_progress


class Terminal(io.StringIO):
    """A stream that says that people look at it."""

    def isatty(self) -> bool:
        """See above."""
        return True


def time_display(stream: io.StringIO, tasks: int) -> float:
    """Return processor seconds per task, of the display's own thread too."""
    counts = {"samples": 100, "reason.decode_error": 1, "reason.too_many_pixels": 1}
    begun = time.process_time()
    with make_progress(stream) as progress:
        progress.begin("embed", "shards", tasks, 0, 2)
        for _ in range(tasks):
            progress.advance(counts)
        progress.end()
    return (time.process_time() - begun) / tasks


def time_idle(seconds: float) -> float:
    """Return the share of a core that the terminal's display takes while nothing happens."""
    begun = time.process_time()
    with make_progress(Terminal()) as progress:
        progress.begin("embed", "shards", 10, 0, 2)
        time.sleep(seconds)
    return (time.process_time() - begun) / seconds


def main() -> None:
    """Time, relate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--task-milliseconds", type=float, default=10.0)
    given = parser.parse_args()
    found = {
        name: time_display(stream, given.tasks)
        for name, stream in (("terminal", Terminal()), ("pipe", io.StringIO()))
    }
    share = {name: seconds * 1e3 / given.task_milliseconds for name, seconds in found.items()}
    print(
        json.dumps(
            {
                "microseconds": {name: round(seconds * 1e6, 1) for name, seconds in found.items()},
                "share_of_task": {name: round(one, 5) for name, one in share.items()},
                "share_of_core_idle": round(time_idle(5.0), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
