"""The report of a trial as Markdown, failures first."""

from __future__ import annotations

from benchmarks.gpu_steps.record import describe, show

# Columns of a group's table: the key of a value, and the heading. A step that has the first of them
# gets a row there; the other steps of the group are listed below the table.
COLUMNS = {
    "train": [
        ("samples_per_s", "samples/s"),
        ("ratio", "ratio to straightforward"),
        ("mfu", "MFU"),
        ("of_matmul", "of the matmul rate"),
        ("ms", "ms"),
        ("ms_waited", "ms, waited for"),
        ("ms_host", "ms of the host"),
        ("peak_gib", "peak GiB"),
        ("kernels", "kernels"),
        ("kernel_ms", "ms of kernels"),
        ("first_s", "first step, s"),
    ],
    "sample": [
        ("frames_per_s", "frames/s"),
        ("evaluations_per_s", "evaluations/s"),
        ("ratio", "ratio to straightforward"),
        ("ms_host", "ms of the host"),
        ("peak_gib", "peak GiB"),
        ("kernels", "kernels"),
        ("first_s", "first roll-out, s"),
        ("graphs", "graphs compiled"),
        ("relative_difference", "difference to eager"),
    ],
    "networks": [
        ("encode_frames_per_s", "encoded frames/s"),
        ("decode_frames_per_s", "decoded frames/s"),
        ("ratio", "ratio to float32"),
        ("relative_difference", "difference to float32"),
        ("ms_host", "ms of the host"),
        ("peak_gib", "peak GiB"),
    ],
}


def make_table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, and an empty line."""
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(escape(cell) for cell in cells)} |" for cells in lines] + [""]


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_markdown(groups: list[dict], rows: list[dict]) -> str:
    """groups: as gpu_trial.run_group returns them; rows: as record.read returns them."""
    passed = [row for row in rows if row["state"] == "passed"]
    failed = [row for row in rows if row["state"] == "failed"]
    left_out = [row for row in rows if row["state"] == "left out"]
    seconds = sum(group["seconds"] for group in groups)
    counts = f"{len(passed)} steps passed, {len(failed)} failed, {len(left_out)} were left out"
    lines = ["# GPU trial", "", f"{counts}; {seconds:.0f} s in all.", ""]
    lines += list_reasons("Failed", failed)
    lines += list_reasons("Left out", left_out)
    lines += ["## Groups", ""]
    lines += table_of_groups(groups, rows)
    for group in groups:
        name = group["group"]
        lines += section(name, [row for row in rows if row["group"] == name and "values" in row])
    return "\n".join(lines).rstrip() + "\n"


def list_reasons(heading: str, rows: list[dict]) -> list[str]:
    if not rows:
        return []
    named = [f"- **{row['group']}: {row['step']}**: {row['reason']}" for row in rows]
    return [f"## {heading}", "", *named, ""]


def table_of_groups(groups: list[dict], rows: list[dict]) -> list[str]:
    cells = []
    for group in groups:
        own = [row["state"] for row in rows if row["group"] == group["group"]]
        passed, failed = own.count("passed"), own.count("failed")
        times = [f"{group['seconds']:.0f}", f"{group['limit']:.0f}"]
        cells.append([group["group"], *times, str(passed), str(failed), group["ended"]])
    return make_table(["group", "seconds", "limit", "passed", "failed", "ended"], cells)


def section(name: str, rows: list[dict]) -> list[str]:
    """Steps of a group with values: those with numbers to compare in a table, then the others."""
    if not rows:
        return []
    lines = [f"## {name}", ""]
    columns = COLUMNS.get(name, [])
    compared = []
    others = []
    for row in rows:
        in_table = bool(columns) and columns[0][0] in row["values"]
        (compared if in_table else others).append(row)
    if compared:
        known = {key for row in compared for key in row["values"] if row["values"][key] is not None}
        columns = [(key, heading) for key, heading in columns if key in known]
        headings = ["step"] + [heading for _, heading in columns]
        cells = []
        for row in compared:
            name = row["step"] + (" (failed)" if row["state"] == "failed" else "")
            cells.append([name] + [show(row["values"].get(key)) for key, _ in columns])
        lines += make_table(headings, cells)
    if others:
        cells = [[row["step"], describe(row), f"{row['seconds']:.1f}"] for row in others]
        lines += make_table(["step", "found", "seconds"], cells)
    for row in compared:
        if row["values"].get("longest_kernels"):
            lines.append(f"- Longest kernels of {row['step']}: {row['values']['longest_kernels']}")
    return [*lines, ""]
