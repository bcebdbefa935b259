"""Runs `meetjax` command lines, one a line of stdin, each in a fork of this process, and answers with its process id; a line with a
process id waits for that process and answers with its status.

Everything is imported before the first fork and nothing is started: a fork is a fresh process without the seconds of importing.
"""

from __future__ import annotations

import json
import os
import sys

import grain
import jax
import transformers

import meetjax.align
import meetjax.cli
import meetjax.generate.requests

PRELOADED = (grain, meetjax.align, meetjax.generate.requests, transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast)
"""What the forks use; transformers loads its parts when they are first asked for."""

for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        print(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]), flush=True)
        continue
    if (pid := os.fork()) == 0:
        for number, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.chdir(request["folder"])
        os.environ |= request["environment"]
        jax.config.update("jax_num_cpu_devices", request["devices"])
        sys.argv = ["meetjax", *request["arguments"]]
        meetjax.cli.main()
        sys.exit()
    print(pid, flush=True)
