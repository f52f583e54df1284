"""The ratios as a bar chart, SVG."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.tables import NAMES, TARGETS

OURS, THEIRS = "#2f6f9f", "#9aa3ab"


def bars(records: Iterable[dict]) -> list[tuple[str, dict, float | None]]:
    """(label, how many times faster than TRL, what was asked) of each case that passed; start-up turned over."""
    found = {}
    for record in records:
        for name, case in record.get("cases", {}).items():
            if "ratio" not in case or not case["passed"]:
                continue
            ratio, target = case["ratio"], TARGETS.get(name, ("", None))[1]
            if case["unit"] == "s":
                ratio = {"median": 1 / ratio["median"], "min": 1 / ratio["max"], "max": 1 / ratio["min"]}
                target = target and 1 / target
            model = f" ({case['shape']})" if case["shape"] != "-" else ""
            found[name, case["shape"]] = (NAMES.get(name, name) + model, ratio, target)
    return list(found.values())


def write_chart(path: Path, records: Iterable[dict]) -> None:
    """Draw how many times faster than TRL each case is, with the spread over rounds and what was asked."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "paddle-finetune", "svg.fonttype": "none", "font.size": 10}
    import matplotlib.pyplot as plt

    shown = bars(records)
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.45 * max(1, len(shown))), layout="constrained")
    for place, (_, ratio, target) in enumerate(shown):
        low, high = ratio["median"] - ratio["min"], ratio["max"] - ratio["median"]
        axes.barh(place, ratio["median"], color=OURS, height=0.6, xerr=[[low], [high]], ecolor="#222222", capsize=3)
        axes.text(max(ratio["max"], target or 0.0) + 0.04, place, f"{ratio['median']:.2f}", va="center")
        if target:
            axes.plot([target, target], [place - 0.38, place + 0.38], color="#c0392b", linewidth=2)
    axes.axvline(1.0, color=THEIRS, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(shown)), [label for label, _, _ in shown])
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as TRL, in decoding transformers, on the same machine (red: asked for)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
