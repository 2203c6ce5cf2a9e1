"""Rows about text: its files, where it lies, how long its documents are."""

from __future__ import annotations

import sqlite3

from benchmarks.reports.row import Row, Seen
from benchmarks.reports.world import World, document, write_documents, write_records, write_teacher


def json_records(world: World) -> Seen:
    """An array of records under the name .json is read as records; a field that does not exist is refused."""
    teacher = write_teacher(world.folder / "teacher")
    texts = [document(1000 + i) for i in range(60)]
    counts = []
    for path, lines in ((world.folder / "x.jsonl", True), (world.folder / "x.json", False)):
        planned = world.plan(teacher, write_records(path, texts, lines=lines), "--field", "text")
        if planned.code:
            return Seen("read, or refused by name", planned.tail(), planned.code == 2 and path.name in planned.text)
        counts.append(planned.json["text"])
    missing = world.plan(teacher, world.folder / "x.json", "--field", "texts")
    return Seen.equal(*counts).also(f"absent field: exit {missing.code}", missing.code == 2 and "texts" in missing.text)


def home_inside_text(world: World) -> Seen:
    """`--data .` with the default home inside: interrupted once, the same command goes on with the same study."""
    folder = write_documents(world.folder / "text")
    teacher = write_teacher(world.folder / "teacher")
    command = ("search", "--teacher", teacher, "--data", ".", "--budget", "60s")
    first = world.paretune(*command, cwd=folder, interrupt_after=25)
    second = world.paretune(*command, cwd=folder)
    studies = list((folder / "mlruns" / "studies").iterdir())
    return Seen(
        "130, then continued to exit 0 or 3, one study",
        f"exit {first.code}, {second.code}, {len(studies)} studies: {second.tail(120)}",
        (first.code, len(studies)) == (130, 1) and second.code in (0, 3) and "continued" in second.err,
    )


def one_large_document(world: World) -> Seen:
    """Nine small records and one of 3 MB: split within documents, or said beforehand."""
    data = write_records(world.folder / "x.jsonl", [document(i, 2000) for i in range(9)] + [document(9, 3_000_000)])
    teacher = write_teacher(world.folder / "teacher")
    planned = world.plan(teacher, data, "--field", "text")
    if planned.code:
        return Seen("searched, or refused beforehand", planned.tail(), planned.code == 2 and "document" in planned.text)
    return Seen.runs(world.search(teacher, data, "--field", "text"))


def one_line_records(world: World) -> Seen:
    """Records of one line cost about as much per token as long documents."""
    teacher = write_teacher(world.folder / "teacher")
    long = [document(1000 + i) for i in range(60)]
    short = [line for text in long for line in text.splitlines()]
    seconds = []
    for name, texts in (("long", long), ("short", short)):
        home = world.folder / f"home-{name}"
        data = write_records(world.folder / f"{name}.jsonl", texts)
        ended = world.search(teacher, data, "--field", "text", "--budget", "100s", home=home)  # until rung 0 is reached
        if ended.code not in (0, 3):
            return Seen.runs(ended)
        seconds.append(_seconds_per_candidate(home, world))
    return Seen(
        "at most twice the seconds of long documents",
        f"{seconds[0]:.2f} s and {seconds[1]:.2f} s per candidate",
        seconds[1] <= 2 * seconds[0],
    )


def _seconds_per_candidate(home: object, world: World) -> float:
    """Median seconds of a candidate's scoring at rung 0."""
    from pathlib import Path

    with sqlite3.connect(f"file:{world.study(Path(str(home))) / 'study.db'}?mode=ro", uri=True) as database:
        rows = database.execute(
            "SELECT seconds FROM evaluation WHERE fidelity = 'rung0' AND status = 'complete' ORDER BY seconds"
        ).fetchall()
    return float(rows[len(rows) // 2][0])


ROWS = (
    Row(6, "records in a .json file", json_records),
    Row(7, "the home inside the text", home_inside_text),
    Row(18, "nine small records and one of 3 MB", one_large_document),
    Row(19, "one-line records", one_line_records),
)
