# SPDX-License-Identifier: Apache-2.0
"""Display: the text of a run while it is generated, and its numbers at the end."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from .pipeline import describe
from .run_config import ATTENTION
from .tables import print_table
from .tokenizer import TextStream, Tokenizer

_TAIL = 48


class Display:
    """Answers go to standard output, everything else to standard error.

    One prompt is streamed as it grows. Several are printed as each is complete, in order, while a progress
    bar with the last words of each running sequence is shown where standard error is a terminal.
    """

    def __init__(self, tokenizer: Tokenizer, texts: list[str], prompts: list[list[int]], max_new: int) -> None:
        self._texts = texts
        self._streams = [TextStream(tokenizer, prompt) for prompt in prompts]
        self._answers = ["" for _ in prompts]
        self._is_finished = [False for _ in prompts]
        self._num_printed = 0
        self._max_new = max_new
        self._console = Console(stderr=True, highlight=False)
        self._tasks: dict[int, TaskID] = {}
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(20),
                TextColumn("{task.completed}/{task.total}"),
            )
            # Without the last argument rich would send standard output to its own console, which is standard error.
            self._progress = Progress(
                *columns, TimeElapsedColumn(), console=self._console, transient=True, redirect_stdout=False
            )
            self._tasks[-1] = self._progress.add_task("sequences", total=len(prompts))

    def __enter__(self) -> Display:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop_progress()

    def _stop_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def event(self, event: dict[str, Any]) -> None:
        """Show what an event of a rank brings."""
        if event["event"] == "stderr":
            self._console.print(f"[{event['role']} {event['rank']}] {event['text']}", markup=False)
        elif event["event"] == "tokens":
            for idx, token_id, finish in event["tokens"]:
                self._token(idx, token_id, finish is not None)

    def _token(self, idx: int, token_id: int, is_last: bool) -> None:
        new_text = self._streams[idx].add(token_id)
        if is_last:
            new_text += self._streams[idx].rest()
        self._answers[idx] += new_text
        if len(self._texts) == 1:
            self._stop_progress()  # it has bridged the loading; the text itself shows progress now
            head = self._texts[0] if self._num_printed == 0 else ""
            self._num_printed = 1
            sys.stdout.write(head + new_text + ("\n" if is_last else ""))
            sys.stdout.flush()
            return
        self._is_finished[idx] = is_last
        self._show_progress(idx, is_last)
        while self._num_printed < len(self._texts) and self._is_finished[self._num_printed]:
            self._print_answer(self._num_printed)
            self._num_printed += 1

    def _show_progress(self, idx: int, is_last: bool) -> None:
        if self._progress is None:
            return
        if idx not in self._tasks:
            self._tasks[idx] = self._progress.add_task("", total=self._max_new)
        tail = " ".join((self._texts[idx] + self._answers[idx]).split())[-_TAIL:]
        self._progress.update(self._tasks[idx], advance=1, description=f"{idx:3} {tail:{_TAIL}}")
        if is_last:
            self._progress.remove_task(self._tasks[idx])
            self._progress.advance(self._tasks[-1])

    def _print_answer(self, idx: int) -> None:
        text = f"[{idx}] {self._texts[idx]}{self._answers[idx]}\n"
        if self._progress is not None and sys.stdout.isatty():
            self._progress.console.print(text, markup=False, soft_wrap=True)
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def summary(self, about: dict[str, Any]) -> None:
        """Tokens per second, each rank's busy and waiting time and bytes, and how well the pipeline was filled."""
        table = Table(box=None, pad_edge=False, header_style="")
        for column in ("rank", "busy s", "waiting s", "sent MB", "received MB", "steps or batches"):
            table.add_column(column, justify="left" if column == "rank" else "right", no_wrap=True)
        for rank in about["ranks"]:
            work = rank["steps"] if rank["role"] == ATTENTION else rank["batches"]
            times = (f"{rank['busy_s']:.3f}", f"{rank['wait_s']:.3f}")
            moved = (f"{rank['bytes_sent'] / 1e6:.3f}", f"{rank['bytes_received'] / 1e6:.3f}")
            table.add_row(f"{rank['role']} {rank['rank']}", *times, *moved, str(work))
        self._console.print(
            f"{about['tokens']} tokens of {about['sequences']} sequences in {about['seconds']:.2f} s: "
            f"{about['tokens_per_s']:.1f} tokens/s, {about['bytes_moved'] / 1e6:.3f} MB moved"
        )
        print_table(self._console, table)
        self.lines(describe(about["pipeline"]))

    def lines(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(line, markup=False, soft_wrap=True)
