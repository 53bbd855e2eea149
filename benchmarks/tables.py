"""The tables of docs/performance.md, docs/memory.md and the README, made from the JSON in `benchmarks/results/`, never by hand.

`python -m benchmarks.tables` rewrites what stands between `<!-- table: NAME -->` and `<!-- end -->`. Each table says which
command, commit, machine and versions it comes from; a table without results says that it was not measured.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "performance.md", ROOT / "docs" / "memory.md", ROOT / "README.md"]
Document = dict[str, Any]


def provenance(document: Document) -> str:
    versions = ", ".join(f"{k} {document['versions'].get(k, '?')}" for k in ("torch", "transformers", "trl"))
    device = document["device"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    return f"`{document['command']}`, {device['name']}{threads}, commit {document['commit']}, {versions}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def throughput(document: Document) -> str:
    rows = []
    for row in document["rows"]:
        times, tokens, memory = [], [], []
        for side in (row["trl"], row["lorat"]):
            known = "seconds_per_step" in side
            word = next(iter(side))
            times.append(f"{side['seconds_per_step']['median']:.2f}" if known else word)
            tokens.append(f"{sum(side['tokens_per_step'].values()):,.0f}" if known else "-")
            memory.append(f"{side['memory_mb']['above']:,.0f}" if known else "-")
        ratio = "-"
        if row["ratio"]:
            spread = row["ratio"]["by_step"]
            ratio = f"**{row['ratio']['throughput']:.2f} ×** ({spread['p20']:.2f} to {spread['p80']:.2f})"
        what = f"{row['workload']} ({row['lengths']}), {row['method']}, {row['pairs']} a step"
        what += "" if row["checkpointing"] else ", no checkpointing"
        rows.append([what, *times, ratio, *tokens, *memory])
    head = ["", "TRL s/step", "lorat s/step", "ratio (p20 to p80)", "TRL tokens", "lorat tokens", "TRL MB", "lorat MB"]
    return markdown(head, rows)


def profile(document: Document) -> str:
    kinds = sorted({kind for row in document["rows"] for kind in row["ms_by_kind"]})
    first = document["rows"][0]["ms_by_kind"]
    kinds.sort(key=lambda kind: -first.get(kind, 0))
    head = ["share of the step's time"] + [f"{row['tokens']:,} tokens" for row in document["rows"]]
    rows = []
    for kind in kinds:
        shares = [r["ms_by_kind"].get(kind, 0) / sum(r["ms_by_kind"].values()) for r in document["rows"]]
        rows.append([kind, *(f"{share:.1%}" for share in shares)])
    rows.append(["ms a step", *(f"{1e3 * r['seconds_per_step']['median']:,.0f}" for r in document["rows"])])
    rows.append(["T/s of plain products", *(f"{r['product_rate'] / 1e12:,.2f}" for r in document["rows"])])
    rows.append(["matrix-unit use (floor / time / rate)", *(f"{r['matrix_unit_use']:.1%}" for r in document["rows"])])
    return markdown(head, rows)


def memory(document: Document) -> str:
    """Measured and predicted peaks; the long run under a cap; host memory while loading."""
    parts = []
    rows = []
    for row in document["step"]:
        lorat, trl = (row.get(name, {}).get("memory_mb", {}).get("peak") for name in ("lorat", "trl"))
        error = f"{row['error_percent']:+.1f} %" if "error_percent" in row else "-"
        told = [f"{x:,.0f}" if x else "-" for x in (lorat, trl, row["predicted"]["allocated_mb"])]
        rows.append([f"{row['tokens']:,} tokens{'' if row['checkpointing'] else ', no checkpointing'}", *told, error])
    if rows:
        parts.append(markdown(["a step of", "lorat MB", "TRL MB", "predicted for a GPU, MB", "error"], rows))
    if run := document["long"]:
        ended = "ran to its end" if run["finished"] else "did not finish"
        pack = f"packs of {run['max_tokens_per_pack']:,} tokens"
        parts.append(
            f"{run['steps']} steps with {pack} under a cap of {document['settings']['memory_cap']} bytes: {ended}."
        )
    if (load := document["load"]) and "quantised_mb" in load:
        gib = lambda mb: f"{mb * 1e6 / 2**30:.2f}"  # noqa: E731
        size, peak, grown = load["quantised_mb"], load["peak_mb"]["VmRSS"], load["grown_mb"]
        rows = [
            [f"checkpoint in bf16, {load['checkpoint']['shards']} files", gib(load["checkpoint"]["mb"]), ""],
            ["the model in 4-bit", gib(size), "1.00"],
            ["process at its peak, all that is resident", gib(peak), ""],
            ["grown while loading", gib(grown["VmRSS"]), f"{grown['VmRSS'] / size:.2f}"],
            ["of it mapped files", gib(grown["RssFile"]), f"{grown['RssFile'] / size:.2f}"],
        ]
        parts.append(markdown(["host memory", "GiB", "of the 4-bit size"], rows))
    return "\n\n".join(parts)


NAMES = ("profile", "memory", "memory-load", "memory-8gb", "throughput", "throughput-24gb")
KINDS: dict[str, Callable[[Document], str]] = {"throughput": throughput, "profile": profile, "memory": memory}


def table(name: str, results: Path) -> str:
    """The tables of every `NAME-*.json`, the newest machine's name last; or that there is none."""
    parts = []
    longer = [other for other in NAMES if other.startswith(f"{name}-")]
    for path in sorted(results.glob(f"{name}-*.json")):
        if any(path.name.startswith(f"{other}-") for other in longer):
            continue  # memory-8gb-h200.json is not a machine's "memory"
        document = json.loads(path.read_text())
        parts.append(f"{KINDS[name.partition('-')[0]](document)}\n\n{provenance(document)}")
    return "\n\n".join(parts) or "*Not measured yet.*"


def render(results: Path, pages: list[Path] = PAGES) -> list[str]:
    """Rewrite the tables of `pages`; returns the names found."""
    names = []

    def made(found: re.Match[str]) -> str:
        names.append(found[1])
        return f"<!-- table: {found[1]} -->\n\n{table(found[1], results)}\n\n<!-- end -->"

    for page in pages:
        if page.exists():
            text = page.read_text()
            page.write_text(re.sub(r"<!-- table: ([\w-]+) -->.*?<!-- end -->", made, text, flags=re.S))
    return names


if __name__ == "__main__":
    print(", ".join(render(ROOT / "benchmarks" / "results")) or "no table found", file=sys.stderr)
