"""A side of the benchmark: a process that loads its libraries once and answers requests, one JSON line each way."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Broken(Exception):
    """A side ended where it should have answered."""


class Worker:
    """Runs `file` as a process of its own and asks it; while one side works the other waits for input and takes no core."""

    def __init__(self, file: Path, *arguments: str, log: Path):
        self.file = file
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            [sys.executable, str(file), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("a"), text=True, env=environment,
        )  # fmt: skip

    def ask(self, name: str, **arguments: Any) -> Any:
        """What the process's function `name` returns."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Broken(f"{self.file.name} {name}: the process ended; its log says why")
        return json.loads(line)

    def close(self) -> float:
        """Ends the process; the most memory it ever held, in GB: on an accelerator that one's, on CPU resident memory."""
        peak = self.ask("peak")
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        return peak


def serve(functions: dict[str, Callable[..., Any]], device_peak: Callable[[], float | None]) -> None:
    """Answers requests until the input ends. What libraries print goes to the log. device_peak: GB, None on CPU."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    functions["peak"] = lambda: device_peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    for line in sys.stdin:
        name, arguments = json.loads(line)
        answers.write(json.dumps(functions[name](**arguments)) + "\n")
        answers.flush()
