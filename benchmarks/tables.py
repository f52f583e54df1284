"""Results as tables: on a terminal, and in docs/performance.md between its markers. No figure is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.figures import WARM_UP, exponents, fitted_law

# What each case is to reach, and the memory of those for which a limit was set.
TARGETS = {
    "sft_lora": ("at least", 1.5),
    "sft_full": ("at least", 1.3),
    "dpo_lora": ("at least", 2.0),
    "prepare": ("at least", 2.0),
    "startup": ("at most", 0.8),
    "decode": ("at least", 1.2),
    "decode_batch": ("at least", 1.2),
}
NAMES = {
    "sft_lora": "SFT LoRA, tokens/s",
    "sft_full": "SFT full, tokens/s",
    "dpo_lora": "DPO LoRA, pairs/s",
    "prepare": "preparation, rows/s",
    "startup": "start-up, time",
    "decode": "decoding one row, tokens/s",
    "decode_batch": "decoding 8 rows, tokens/s",
}
MEMORY_TARGETS = {"sft_lora": 0.6, "dpo_lora": 0.6}
NOTHING = "not measured yet"
_HEAD = ("case", "model", "ours", "TRL", "ratio", "asked", "CPU time", "peak memory", "of TRL's", "FLOPs used")


def plain_table(record: dict) -> str:
    """The results of a run in columns."""
    rows = [_HEAD, *(_row(name, case) for name, case in record["cases"].items())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def ratio_table(records: Iterable[dict]) -> str:
    """The same in Markdown, of several runs; a later result of a case and model takes the place of an earlier one."""
    rows = {(name, case["shape"]): _row(name, case) for r in records for name, case in r.get("cases", {}).items()}
    return _markdown(_HEAD, list(rows.values()))


def conditions(records: Iterable[dict]) -> str:
    """On what the results were measured, one line a run."""
    lines = []
    for record in records:
        machine = record["machine"]
        loads = [a["process"]["load_before"] for case in record.get("cases", {}).values() for a in _answers(case)]
        load = f", load before each process at most {max(loads):.1f}" if loads else ""
        what = ", ".join([*map(_extent, record.get("cases", {}).items()), *record.get("scaling", {})])
        commit = f", commit {machine['commit']}" if machine.get("commit") else ""
        lines.append(
            f"- {what}: {machine['date']}{commit}, {machine['processor']}, {machine['cores']} cores, "
            f"{_gib(machine['memory'])}, Python {machine['python']}{load}; {_versions(record)}"
        )
    return "\n".join(lines) or NOTHING


def _extent(named: tuple[str, dict]) -> str:
    """A case and how much of it was run."""
    name, case = named
    rounds = case.get("rounds_run", case.get("settings", {}).get("rounds"))
    steps = case.get("settings", {}).get("steps")
    counted = f" x {steps - WARM_UP} counted steps" if steps else ""
    return f"{name} ({rounds} round{'s' * (rounds != 1)}{counted})" if rounds else name


def _answers(case: dict) -> list[dict]:
    rounds = case.get("rounds", {"ours": [], "peers": {}})
    return rounds["ours"] + [answer for answers in rounds["peers"].values() for answer in answers]


def _versions(record: dict) -> str:
    found = {}
    for case in record.get("cases", {}).values():
        for side in ("ours", "peer"):
            found |= case.get(side, {}).get("versions", {})
    names = ("paddlepaddle", "paddlenlp", "torch", "transformers", "trl", "peft")
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


def _row(name: str, case: dict) -> tuple[str, ...]:
    if "error" in case:
        return (name, case["shape"], "failed: " + case["error"].splitlines()[0][:60], *[""] * 7)
    relation, target = TARGETS.get(name, ("", None))
    sides = case["ours"], case["peer"]
    memory = "{} / {}".format(*(_gib(side["peak"]) for side in sides)) if "peak" in sides[0] else ""
    ratio = _spread(case["ratio"])
    return (
        name,
        case["shape"],
        f"{_number(sides[0]['rate']['median'])} {case['unit']}",
        f"{_number(sides[1]['rate']['median'])} ({case['peer_variant']})",
        ratio if case["passed"] else f"{ratio}, but FAILED: other results",
        f"{relation} {target}" if target else "",
        _spread(case["cpu_ratio"]),
        memory,
        _memory(name, case),
        " / ".join(f"{100 * s['flop_utilisation']['median']:.0f} %" for s in sides if "flop_utilisation" in s),
    )


def _memory(name: str, case: dict) -> str:
    if "memory_ratio" not in case:
        return ""
    limit = f" (at most {MEMORY_TARGETS[name]})" if name in MEMORY_TARGETS else ""
    return f"{case['memory_ratio']['median']:.2f}{limit}"


def variant_table(records: Iterable[dict]) -> str:
    """Every variant of TRL's run that was tried, with what we take of its time and memory."""
    rows = {}
    for record in records:
        for name, case in record.get("cases", {}).items():
            for variant, side in case.get("variants", {}).items():
                times = case["ours"]["rate"]["median"] / side["rate"]["median"]
                share = case["ours"]["peak"] / side["peak"]
                rate = f"{_number(side['rate']['median'])} {case['unit']}"
                rows[name, case["shape"], variant] = (
                    name, case["shape"], variant, rate, _gib(side["peak"]), f"{times:.2f}", f"{share:.2f}"
                )  # fmt: skip
    return _markdown(("case", "model", "TRL's variant", "rate", "peak memory", "times", "memory"), list(rows.values()))


def speed_table(records: Iterable[dict]) -> str:
    """What the README says of speed: the medians, one line a case."""
    rows = {}
    for record in records:
        for name, case in record.get("cases", {}).items():
            if not case["passed"]:
                continue
            ratio, share = case["ratio"]["median"], case.get("memory_ratio", {}).get("median")
            times = f"{1 / ratio if case['unit'] == 's' else ratio:.1f}"
            rows[name, case["shape"]] = (NAMES[name], times, f"{share:.2f}" if share else "")
    return _markdown(("", "times as fast", "of its memory"), list(rows.values()))


# -- cost as work grows ----------------------------------------------------------------------------------------


def growth_table(records: Iterable[dict], series: str) -> str:
    """Sizes, cost, and the power with which each cost grows from one size to the next."""
    found = [record for record in records if series in record.get("scaling", {})]
    if not found or not found[-1]["scaling"][series]["points"]:
        return NOTHING
    last = found[-1]["scaling"][series]
    points = last["points"]
    sizes = [point["size"] for point in points]
    powers = ["", *(f"{power:.2f}" for power in exponents(sizes, [point["seconds"] for point in points]))]
    rows = [
        (
            f"{point['size']:,}",
            f"{point['seconds']:.3g}",
            f"{point['cpu_seconds']:.3g}",
            f"{point['work'] / point['seconds']:,.0f}",
            _gib(point["peak"]),
            power,
        )
        for point, power in zip(points, powers)
    ]
    head = (last["label"], "seconds", "CPU seconds", f"{last['unit']}/s", "peak memory", "power")
    machine = found[-1]["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, load before it {machine['load_before']:.1f}"
    notes = f"Model: {last['shape']}. Measured {machine['date']} on {where}."
    if len(points) > 2:
        notes += f" {_law(sizes, [point['seconds'] for point in points])}"
    return f"{notes}\n\n{_markdown(head, rows)}"


def _law(sizes: Sequence[float], seconds: Sequence[float]) -> str:
    """The fitted law in words, and where one term takes over from another."""
    (fixed, linear, square), deviation = fitted_law(sizes, seconds)
    terms = [f"{fixed:.3g}"] * (fixed > 0) + [f"{linear:.3g} n"] * (linear > 0) + [f"{square:.3g} n²"] * (square > 0)
    bends = []
    if fixed and linear:
        bends.append(f"what is fixed is half of it at n = {fixed / linear:,.0f}")
    if linear and square:
        bends.append(f"the square equals the linear part at n = {linear / square:,.0f}")
    where = f" ({'; '.join(bends)})" if bends else ""
    return f"Law: seconds = {' + '.join(terms)}{where}, which no point misses by more than {100 * deviation:.0f} %."


# -- the page --------------------------------------------------------------------------------------------------


def update_page(page: Path, records: Sequence[dict]) -> None:
    """Write all tables of the page between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        ValueError: a table of the page is unknown.
    """

    def fill(match: re.Match) -> str:
        return f"<!-- begin {match[1]} -->\n{_table(match[1], records)}\n<!-- end {match[1]} -->"

    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", fill, text, flags=re.DOTALL), encoding="utf-8")


def _table(name: str, records: Sequence[dict]) -> str:
    if name == "ratios":
        table = ratio_table(records)
        return table if table == NOTHING else f"![Times as fast as TRL](performance.svg)\n\n{table}"
    made = {"conditions": conditions, "variants": variant_table, "speed": speed_table}
    if name in made:
        return made[name](records)
    if name.startswith("growth_"):
        return growth_table(records, name.removeprefix("growth_"))
    raise ValueError(f"the page asks for a table {name!r}, which nobody makes")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return NOTHING
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: dict) -> str:
    """The median, and the range where there was more than one round."""
    if values["min"] == values["max"]:
        return f"{values['median']:.2f}"
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
