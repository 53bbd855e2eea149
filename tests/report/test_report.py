"""The report: what it reads, what it draws and where, and that nothing of a run gets out of its text."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from lorat.cli.main import main
from lorat.errors import ConfigError, DataError
from lorat.report import plots
from lorat.report.page import render, write_report
from lorat.report.tables import results, settings_tables, shown
from lorat.runs.log import RunLog, read_run, read_runs
from tests.helpers.worlds import make_pairs


class Page(HTMLParser):
    """`tags`: `(name, attributes)` in order; `text`: all text; `cells`: tables as lists of rows of text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.cells, self.open = "", [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.cells.append([])
        elif tag == "tr":
            self.cells[-1].append([])
        elif tag in ("td", "th"):
            self.cells[-1][-1].append("")
            self.open = True

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.open:
            self.cells[-1][-1][-1] += data

    def table(self, heading: str) -> list[list[str]]:
        return next(t for t in self.cells if t[0][0] == heading)


LOSSES = [0.69, 0.66, 0.7, 0.5, 0.45, 0.4]


def make_run(folder, *, steps=6, of=6, moves=(2, 4), evaluated=True, more=(), settings=(), where=".", every=1):
    """A run's files, logged every so many steps, after `steps` of `of` optimiser steps, with values that tests can look for."""
    history = []
    for n in range(1, steps + 1):
        row = {
            "step": n * every,
            "reference/updates": sum(m <= n for m in moves),
            "epoch": n / of,
            "loss": LOSSES[n - 1],
            "grad_norm": 1.0 + n,
            "reference/lag": float(n % 2),
        }
        row |= {"rewards/accuracies": 0.5 + n / 20, "reference/drift": 0.01 * n, **dict(more)}
        history.append(row)
        if evaluated and n % 2 == 0:
            history.append(
                {"step": n * every, "eval_loss": LOSSES[n - 1] + 0.1, "eval_start/rewards/accuracies": 0.5 + n / 50}
            )
    (folder / where).mkdir(parents=True, exist_ok=True)
    state = {"global_step": steps, "max_steps": of, "log_history": history}
    (folder / where / "trainer_state.json").write_text(json.dumps(state))
    (folder / "lorat_run.json").write_text(json.dumps({"method": "dpo", "sync": "hard", "beta": 0.1, **dict(settings)}))
    lines = [{"step": n, "moved": True, "error": 0.001} for n in moves if n <= steps * every]
    (folder / "reference.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def paths(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """Corner points of every path that is stroked in a colour of the page."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*stroke: var\(--{colour}\)', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", d)] for d in found]


def affine(drawn, true) -> None:
    """Assert that drawn coordinates are the true values, scaled and shifted."""
    a, b = np.polyfit(true, drawn, 1)
    assert np.abs(a * np.asarray(true) + b - drawn).max() < 0.01 and abs(a) > 1


def test_a_curve_lies_where_its_values_are(tmp_path):
    run = read_run(tmp_path, "a") if make_run(tmp_path, moves=()) else None
    svg = plots.draw(plots.TRAINING_PANELS[0], [run])
    curve = max(paths(svg, "c0"), key=len)
    assert len(curve) == 6
    affine([x for x, _ in curve], range(1, 7))
    affine([-y for _, y in curve], LOSSES)
    uses = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--c0\)', svg)
    assert len(uses) == 3  # evaluations at 2, 4 and 6: symbols, on the same scale
    every = [*LOSSES, *(LOSSES[n - 1] + 0.1 for n in (2, 4, 6))]
    affine([-y for _, y in curve] + [-float(y) for _, y in uses], every)
    affine([x for x, _ in curve] + [float(x) for x, _ in uses], [*range(1, 7), 2, 4, 6])


def test_the_references_moves_are_marked_where_they_happened(tmp_path):
    """Run 0 never moves, run 1 moves twice (full lines too), run 2 50 times (ticks alone)."""
    folders = [make_run(tmp_path / n, moves=m, every=20) for n, m in (("a", ()), ("b", (30, 110)))]
    many = make_run(tmp_path / "c", moves=(), every=20)
    lines = "".join(json.dumps({"step": i, "moved": i % 2 == 0}) + "\n" for i in range(20, 120))
    (tmp_path / "c" / "reference.jsonl").write_text(lines)  # 50 moves, and 50 times it was let be
    svg = plots.draw(plots.TRAINING_PANELS[0], read_runs([*folders, many]))
    groups = re.findall(r'<g class="updates">(.*?)</g>', svg, re.DOTALL)
    ticks = [paths(g, f"c{i}") for g, i in zip(groups, (1, 2), strict=True)]
    curve = next(p for p in paths(svg, "c1") if len(p) == 6)
    for drawn, steps in ((ticks[0], (30, 110)), (ticks[1], range(20, 120, 2))):
        at = [line[0][0] for line in drawn]
        assert len(at) == len(steps) and all(line[0][0] == line[1][0] for line in drawn)
        fit = np.polyfit(range(20, 121, 20), [x for x, _ in curve], 1)
        assert np.abs(np.polyval(fit, steps) - at).max() < 1.0  # a mark is put on the nearest of 400 places
    full = [line for line in paths(svg, "c1") if len(line) == 2 and abs(line[0][1] - line[1][1]) > 50]
    affine([line[0][0] for line in full] + [x for x, _ in curve], [30, 110, *range(20, 121, 20)])
    assert not any(len(line) == 2 and abs(line[0][1] - line[1][1]) > 50 for line in paths(svg, "c2"))


def test_long_runs_are_thinned_to_means_over_equal_spans():
    steps, values = np.arange(1, 6001), np.random.default_rng(0).normal(size=6000)
    x, y = plots.thinned(steps, values, 600)
    assert len(x) == 600 and y.mean() == pytest.approx(values.mean(), abs=0.01)
    first = steps[((steps - 1) / 5999 * 600).astype(int) == 0]
    assert x[0] == first.mean() and y[0] == pytest.approx(values[: len(first)].mean(), abs=1e-12)
    gap = plots.thinned([*range(1000), 9999], [2.0] * 1001, 600)  # spans without a log are no points
    assert len(gap[0]) == 61 and set(gap[1]) == {2.0} and gap[0][-1] == 9999
    assert [list(v) for v in plots.thinned([1, 2], [3.0, 4.0])] == [[1, 2], [3, 4]]


def test_what_a_panel_has_nothing_for_is_left_out_and_memory_is_found(tmp_path):
    make_run(tmp_path, evaluated=False, more={"memory/peak_gib": 3.5, "kl": float("nan")})
    html = render([read_run(tmp_path, "r")])
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    assert "memory/peak_gib" in titles and "Loss" in titles and "Lag" in titles
    assert not {"Accuracy against the start", "Margin against the start", "z₀", "Learning rate"} & set(titles)
    assert "No evaluation was logged" in html
    make_run(tmp_path)
    html = render([read_run(tmp_path, "r")])
    assert "Accuracy against the start" in html and "No evaluation was logged" not in html


def test_a_run_in_progress_is_read_from_its_newest_checkpoint(tmp_path):
    folder = tmp_path / "run"
    make_run(folder, steps=2, where="checkpoint-2")
    make_run(folder, steps=4, where="checkpoint-4")
    run = read_run(folder, "run")
    assert (run.source, run.step, run.finished) == ("checkpoint-4/trainer_state.json", 4, False)
    assert run.series("loss") == ([1, 2, 3, 4], LOSSES[:4]) and run.updates() == [2, 4]
    assert Page(render([run])).table("run")[1][1] == "4 of 6 steps, as of checkpoint-4"
    earlier = read_run(folder / "checkpoint-2", "c")
    assert (earlier.step, earlier.updates(), earlier.settings["sync"]) == (2, [2], "hard")
    (folder / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')  # being deleted, or torn
    assert read_run(folder, "run").step == 2
    make_run(folder)
    assert read_run(folder, "run").finished and read_run(folder, "run").source == "trainer_state.json"


def test_torn_and_foreign_files_are_left_out_with_a_note(tmp_path):
    make_run(tmp_path)
    (tmp_path / "eval.json").write_text('{"preferences": {"mod')
    (tmp_path / "my-samples.jsonl").write_text('{"prompt": "p"')
    with (tmp_path / "reference.jsonl").open("a") as file:
        file.write('{"step": 6, "mov')
    page = Page(render([read_run(tmp_path, "r")]))
    assert "r: eval.json cannot be read" in page.text and "my-samples.jsonl" in page.text
    assert [row[0] for row in page.table("step")] == ["step", "2", "4"]
    (tmp_path / "trainer_state.json").unlink()
    assert "r: no trainer_state.json yet" in render([read_run(tmp_path, "r")])


def test_what_is_no_run_is_refused(tmp_path, capsys):
    make_run(tmp_path / "a")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err
    assert "is no run" in said and "output_dir" in said and not (tmp_path / "r.html").exists()
    with pytest.raises(DataError, match="not a folder"):
        read_runs([str(tmp_path / "none")])
    with pytest.raises(DataError, match="given twice"):
        read_runs([str(tmp_path / "a"), str(tmp_path / "b" / ".." / "a")])
    with pytest.raises(ConfigError, match="8 runs"):
        render([read_run(tmp_path / "a", str(i)) for i in range(8)])
    with pytest.raises(ConfigError, match="--out"):
        write_report([str(tmp_path / "a")], tmp_path / "no" / "r.html")


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    folders = [make_run(tmp_path / n) for n in ("x/seed0/out", "y/seed0/out", "z")]
    assert [run.name for run in read_runs(folders)] == ["x/seed0/out", "y/seed0/out", "z"]


def test_several_runs_have_a_legend_a_colour_each_and_a_table_of_differences(tmp_path):
    a = make_run(tmp_path / "dpo", settings={"sync": "frozen", "seed": 1, "long": "x" * 400 + "a"}, moves=())
    b = make_run(tmp_path / "tr", settings={"sync_every": 2, "seed": 1, "long": "x" * 400 + "b"})
    runs = read_runs([a, b])
    html = render(runs)
    page = Page(html)
    legend = re.findall(r'<i class="key r(\d)">━(.)━</i>([^<]*)</span>', html)
    assert legend == [("0", "●", "dpo"), ("1", "■", "tr")]
    for svg in re.findall(r'<figure[^>]*aria-label="Loss".*?</figure>', html, re.DOTALL):
        assert "var(--c0)" in svg and "var(--c1)" in svg and "var(--c2)" not in svg
    differing, everything = settings_tables(runs)
    assert [row[0] for row in differing.rows] == ["long", "sync", "sync_every"]  # by value, not by what is shown
    assert differing.rows[1:] == [["sync", "frozen", "hard"], ["sync_every", "not recorded", "2"]]
    assert [row[0] for row in everything.rows] == ["beta", "long", "method", "seed", "sync", "sync_every"]
    overview = page.table("run")
    assert [row[0] for row in overview[1:]] == ["dpo", "tr"] and [row[4] for row in overview[1:]] == ["0", "2"]
    assert overview[2][5:7] == ["0.4", "0.62"]
    assert settings_tables(runs[:1])[0] is None


def test_results_and_samples_are_shown_side_by_side(tmp_path):
    folder = tmp_path / "run"
    make_run(folder, settings={"versions": {"torch": "9.9"}})
    evaluation = {
        "preferences": {"pairs": 5, "against": {"policy/start": {"accuracy": [0.75, 0.01], "ece": 0.125}}},
        "generation": {"models": {"policy": {"length": [9.0, None]}}},
    }
    (folder / "eval.json").write_text(json.dumps(evaluation))
    (folder / "eval_results.json").write_text(json.dumps({"eval_loss": 0.25}))
    rate = {"value": 0.625, "low": 0.5, "high": 0.75, "method": "bootstrap"}
    judged = {"a": "x", "b": "y", "judge": {"model": "m"}, "win_rate": rate, "length_controlled_win_rate": None}
    (folder / "judge-tr.json").write_text(json.dumps({**judged, "wins": 3, "ties": 1, "losses": 2, "rows": []}))
    (folder / "judge-other.json").write_text(json.dumps({"win_rate": {"value": 0.125}, "rows": [{"a": "x"}]}))
    (folder / "samples.jsonl").write_text('{"prompt": "p1", "output": "from run"}\n{"prompt": "p2", "output": "two"}\n')
    lines = [{"model": m, "prompt": "p1", "output": f"by {m}"} for m in ("policy", "start")]
    (folder / "eval.samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = tmp_path / "sft.jsonl"
    other.write_text('{"prompt": "p2", "output": "dos"}\n{"prompt": "p1", "output": "uno"}\n')
    assert (
        main(["report", str(folder), "--out", str(tmp_path / "r.html"), "--samples", str(other), "--title", "T&T"]) == 0
    )
    html = (tmp_path / "r.html").read_text()
    page = Page(html)
    assert ["accuracy", "0.75 ± 0.01"] in [row for table in page.cells for row in table]
    assert ["length", "9"] in [row for table in page.cells for row in table]
    assert page.table("comparison")[1:] == [["x against y", "m", "62.5% (50.0% to 75.0%)", "–", "3 / 1 / 2"]]
    assert ["value", "0.125"] in [row for table in page.cells for row in table]
    assert ["loss", "0.25"] in [row for table in page.cells for row in table]
    counted = {**judged, "wins": 3, "ties": 1, "losses": 2, "judged": 6, "pairs": 20}
    (grid,) = results([RunLog("run", folder, results={"judge.json": counted})])
    assert grid.rows[0][2] == "62.5% (50.0% to 75.0%), from only 6 of 20 pairs"
    samples = page.table("prompt")
    assert samples == [
        ["prompt", "run: policy", "run: start", "run: samples", "sft"],
        ["p1", "by policy", "by start", "from run", "uno"],
    ]
    arguments = ["--samples", str(other), f"{folder / 'eval.samples.jsonl'}:start"]
    assert main(["report", str(folder), "--out", str(tmp_path / "r.html"), *arguments]) == 0
    samples = Page((tmp_path / "r.html").read_text()).table("prompt")
    assert samples[0] == ["prompt", "run: samples", "sft", "start"] and samples[1][3] == "by start"
    assert "torch 9.9" in page.text and "<title>T&amp;T</title>" in html
    (tmp_path / "bad.jsonl").write_text("{")
    assert (
        main(["report", str(folder), "--out", str(tmp_path / "r2.html"), "--samples", str(tmp_path / "bad.jsonl")]) == 2
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (192, "192"),
        (1234567, "1,234,567"),
        (0.000123456, "0.0001235"),
        ([1.5, 0.25], "1.5 ± 0.25"),
        (["q", "v"], "q, v"),
        ({"a": 1}, "a: 1"),
        ("a" * 64, "a" * 12 + "…"),
    ],
)
def test_values_as_a_person_reads_them(value, text):
    assert shown(value) == text


HOSTILE = [
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(2)>",
    "\"><iframe src='http://evil.example/'></iframe>",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{$",
    "&lt;b&gt; 'quoted'",
    "a\x00b\x1b[31m",
    "half \ud83d pair",
    "\u202egnp.exe",
]


def test_nothing_of_a_run_gets_out_of_its_text(tmp_path):
    """Names, settings, versions, metric names, results, samples, notes and the title, all of them hostile."""
    bad = "".join(HOSTILE)
    folder = tmp_path / "<img src=x onerror=alert(0)> $x^"
    make_run(folder, more={f"memory {bad}": 1.5, bad: 2.5}, settings={bad: bad, "versions": {bad: bad}, "sync": bad})
    (folder / "eval.json").write_text(json.dumps({bad: {bad: {bad: 1.5}}, "note": bad}))
    (folder / "judge<b>.json").write_text("[")
    (folder / "reference.jsonl").write_text(json.dumps({"step": 2, "moved": True, "reason": bad}) + "\n")
    rows = [{"prompt": bad + str(i), "output": text} for i, text in enumerate(HOSTILE)]
    (folder / "<i>samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = write_report([str(folder)], tmp_path / "r.html", title=bad)
    html = out.read_text(encoding="utf-8")
    page = Page(html)
    allowed = set(
        "html head meta title style body h1 h2 h3 p b i div span table thead tbody tr th td ul li figure".split()
    )
    allowed |= set("figcaption details summary footer svg defs g path use text clippath rect".split())
    assert {tag for tag, _ in page.tags} <= allowed
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("src", "href", "action") for name in attributes), tag
        assert attributes.get("xlink:href", "#").startswith("#")
    assert "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text and "$\\frac{$" in page.text
    assert "\x00" not in html and "\x1b" not in html
    assert len(page.table("prompt")) == 1 + len(HOSTILE)  # every sample in a cell of its own
    addresses = set(re.findall(r'"(https?://[^"]*)"', html))
    assert addresses <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in html


def test_drawings_take_their_colours_from_the_page(tmp_path):
    """Both schemes define every colour that is used, no drawing has one of its own, and text keeps its contrast."""
    make_run(tmp_path)
    html = render([read_run(tmp_path, "r")])
    used = set(re.findall(r"var\((--\w+)\)", html))
    light, dark = (
        dict(re.findall(r"(--\w+): (#\w+)", part)) for part in re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    )
    assert used <= light.keys() == dark.keys()
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b(?!\")", re.sub(r'(xlink:href|clip-path)="[^"]*"', "", svg))

    def luminance(colour: str) -> float:
        full = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
        parts = [int(full[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in (light, dark):
        for name in scheme.keys() - {"--paper", "--card", "--line"}:
            for ground in ("--paper", "--card"):
                high, low = sorted((luminance(scheme[name]), luminance(scheme[ground])), reverse=True)
                ratio = (high + 0.05) / (low + 0.05)  # WCAG 2.1: 4.5 for text, 3 for graphics
                assert ratio >= (4.5 if name in ("--ink", "--soft") else 3), (name, ground, ratio)


def test_the_same_runs_give_the_same_file(tmp_path):
    make_run(tmp_path / "a")
    pages = [write_report([str(tmp_path / "a")], tmp_path / f"{i}.html").read_bytes() for i in range(2)]
    assert pages[0] == pages[1]


def test_a_real_run(neox, tmp_path, capsys):
    """What `lorat train` writes is what the report reads, finished or not."""
    data, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(p) + "\n" for p in make_pairs(24)))
    settings = dict(
        model_name_or_path=neox, dataset_name=data, output_dir=out, sync="hard", sync_every=2, use_cpu="true"
    )
    settings |= dict(
        eval_dataset_name=data, eval_strategy="steps", eval_steps=2, logging_steps=1, save_steps=2, max_steps=5
    )
    settings |= dict(per_device_train_batch_size=4, max_length=64, lora_r=4, learning_rate="5e-3")
    assert main(["train", *(word for k, v in settings.items() for word in (f"--{k}", str(v)))]) == 0
    run = read_run(out, "run")
    assert run.finished and run.updates() == [2, 4] and len(run.series("loss")[0]) == 5
    page = render([run])
    wanted = [p.title for p in (*plots.TRAINING_PANELS, *plots.REFERENCE_PANELS, *plots.MACHINE_PANELS)]
    for title in set(wanted) - {"z₀", "Error of the last blend"}:  # KTO's; a copy's error is 0, and may not be logged
        assert f"<h3>{title}</h3>" in page, title
    (out / "trainer_state.json").unlink()
    shutil.rmtree(out / "checkpoint-5")
    assert main(["report", str(out), "--out", str(tmp_path / "r.html")]) == 0
    assert "4 of 5 steps, as of checkpoint-4" in (tmp_path / "r.html").read_text()
