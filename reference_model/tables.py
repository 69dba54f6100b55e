# SPDX-License-Identifier: Apache-2.0
"""Tables that are legible at any width."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDE = 10_000


def print_table(console: Console, table: Table) -> None:
    """The table where it fits, else its title and a line for each row: columns that are cut say nothing."""
    from rich.measure import Measurement

    if Measurement.get(console, console.options.update(width=_WIDE), table).maximum <= console.width:
        console.print(table)
        return
    if table.title is not None:
        console.print(table.title)
    names = [str(column.header) for column in table.columns[1:]]
    for first, *others in zip(*(column.cells for column in table.columns)):
        cells = ", ".join(f"{name} {cell}" for name, cell in zip(names, others) if cell)
        console.print(f"{first}: {cells}", markup=False, soft_wrap=True)
