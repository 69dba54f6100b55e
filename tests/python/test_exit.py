# SPDX-License-Identifier: Apache-2.0
"""A program may end while daemon threads of it are in verbs: it ends well, and does not wait for them."""

from __future__ import annotations

import subprocess

import exits
import pytest
from processes import program

# Most of these ended otherwise, one in a few processes not: by an abort, or where the lock was missing by a bad access.
PROCESSES = {exits.in_traffic: 6, exits.in_python_code_that_a_verb_calls: 6}


@pytest.mark.parametrize(
    "body",
    [
        exits.in_traffic,
        exits.in_long_waits,
        exits.in_long_waits_on_a_device,
        exits.in_long_waits_and_the_main_thread_in_a_call,
        exits.in_run_ranks,
        exits.in_connects,
        exits.in_python_code_that_a_verb_calls,
    ],
    ids=lambda body: body.__name__,
)
def test_a_program_ends_well_while_daemon_threads_are(body: object) -> None:
    command = program(f"import exits; exits.{body.__name__}()")
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(PROCESSES.get(body, 3))
    ]
    try:
        # The verbs' own deadlines are far later.
        said = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [(process.returncode, text) for process, text in zip(processes, said)] == [(0, "")] * len(processes)
