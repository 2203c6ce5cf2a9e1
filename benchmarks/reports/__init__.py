"""Inputs made after public bug reports, run in full: `make bench NAME=reports`, or `make bench NAME=reports ROWS=3,9`.

One figure per row: what is right, what was seen, and whether they agree. Each row makes its own
teacher, text and home in a temporary folder and runs the program as a user would. A row that this machine cannot make (no root, no
`setpriv`, no locale compiler) says so and counts as not shown.
"""

from benchmarks.reports.run import reports

__all__ = ["reports"]
