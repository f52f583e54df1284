"""What a person sees while a command works: lines, tables and progress bars, all on stderr.

stdout belongs to results (`generate`, `preview --json`), so nothing here ever writes to it. On a terminal, running work
is one live block, a line for each open bar; elsewhere (a pipe, a log file, CI) it is plain lines, a few seconds apart.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

console = Console(stderr=True, highlight=False)

PLAIN_INTERVAL = 5.0
"""Seconds between two plain lines of one bar."""

PLAIN_DELAY = 2.0
"""Seconds before the first of them, so that quick work leaves its closing line only."""

RATE_WINDOW = 30.0
"""Seconds over which the shown rate is averaged."""

MARK_INTERVAL = 0.1
"""Seconds between two points of that window, so that a bar over a million rows stays small."""

BAR_WIDTH = 30

_SHORT_NAMES = {
    "learning_rate": "lr",
    "tokens_per_second": "tok/s",
    "eval_loss": "eval loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "eval_rewards/accuracies": "accuracy",
    "eval_rewards/margins": "margin",
}

_warned: set[str] = set()

# Control characters but tab and newline, line separators, and what turns the direction of text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def mute() -> None:
    """Write nothing more: for the ranks other than the first of a distributed run."""
    console.quiet = True


def printable(text: str) -> str:
    """The text with control characters written out (`\\x1b`), which could otherwise move the cursor or forge lines.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str, style: str | None = None, *, to_copy: bool = False) -> None:
    """Print one message. `text` is printed as it is, but for control characters: square brackets are no markup.

    Args:
        to_copy: It is a command: its lines are left whole, for a break would be copied with them.
    """
    console.print(Text(printable(text), style=style or ""), soft_wrap=to_copy or not _live_terminal())


def warn(text: str) -> None:
    """Print a warning, the first time only that this text is given."""
    if text not in _warned:
        _warned.add(text)
        line = Text.assemble(("warning: ", "bold yellow"), printable(text))
        console.print(line, soft_wrap=not _live_terminal())


def table(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    """Print names and values in two columns, for what is known before a run starts.

    Integers are grouped by thousands. None, as the value of a row, leaves the row out.
    """
    shown = [(name, format_value(value)) for name, value in rows if value is not None]
    if not _live_terminal():
        width = max((len(name) for name, _ in shown), default=0)
        console.print(Text(title), soft_wrap=True)
        for name, value in shown:
            console.print(Text(f"  {name:<{width}}  {value}"), soft_wrap=True)
        return
    grid = Table(
        box=box.SIMPLE, show_header=False, title=Text(title, style="bold"), title_justify="left", pad_edge=False
    )
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in shown:
        grid.add_row(Text(name), Text(value))
    console.print(grid)


@contextmanager
def progress(
    total: int | None, description: str, unit: str = "step", done: int = 0, stays: bool = False
) -> Iterator[Bar]:
    """Show how far a piece of work has come.

    Bars may be opened inside each other (an evaluation during training). On a terminal an inner bar vanishes when it is
    done, unless it stays, and the outer one leaves its last line behind. In plain text a bar prints a line after
    `PLAIN_DELAY` seconds (an inner one after `PLAIN_INTERVAL`), then one every `PLAIN_INTERVAL` seconds, and its last
    state.

    Args:
        total: Units of work in all, `done` included; None when unknown.
        description: One or two words in front of the bar, such as `train`.
        unit: What is counted, singular.
        done: Units that were done before this process started. They count as done, but not for the rate.
        stays: Leave the closing line on a terminal too where the bar is an inner one.
    """
    bar = Bar(total, description, unit, done, stays=stays)
    _display.open(bar)
    try:
        yield bar
    except BaseException:
        bar.stopped = True
        raise
    finally:
        _display.close(bar)


class Bar:
    """One progress bar, made by `progress`."""

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str = "step",
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        stays: bool = False,
    ):
        self.total = total
        self.description = description
        self.unit = unit
        self.done = done
        self.stays = stays
        self.fields: dict[str, Any] = {}
        self.stopped = False
        self.printed_at: float | None = None
        self._clock = clock
        self._first = done
        self.started = clock()
        self._marks: deque[tuple[float, int]] = deque([(self.started, done)])

    def advance(self, n: int = 1, **fields: Any) -> None:
        """Count `n` units as done, and show `fields` beside the bar (see `update`)."""
        self.done += n
        now = self._clock()
        if len(self._marks) > 1 and now - self._marks[-2][0] < MARK_INTERVAL:
            self._marks.pop()
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and self._marks[1][0] < now - RATE_WINDOW:
            self._marks.popleft()
        self.update(**fields)
        _display.changed(self, now)

    def update(self, **fields: Any) -> None:
        """Show values beside the bar, in the order in which their names first came.

        `learning_rate` is shown as lr and `tokens_per_second` as tok/s; a name that ends in `/s` stands behind its
        value. None takes a field away.
        """
        for name, value in fields.items():
            if value is None:
                self.fields.pop(name, None)
            else:
                self.fields[name] = value

    @property
    def never_began(self) -> bool:
        """Whether it was stopped at once with nothing done: what stopped it says all there is to say."""
        return self.stopped and self.done == self._first and self.elapsed < PLAIN_DELAY

    @property
    def elapsed(self) -> float:
        """Seconds since the bar was opened."""
        return self._clock() - self.started

    @property
    def rate(self) -> float | None:
        """Units per second over about the last `RATE_WINDOW` seconds; None before the first unit is done."""
        (first_time, first_done), (last_time, last_done) = self._marks[0], self._marks[-1]
        if last_done <= first_done or last_time <= first_time:
            return None
        return (last_done - first_done) / (last_time - first_time)

    @property
    def mean_rate(self) -> float | None:
        """Units per second since the bar was opened; None before the first unit is done."""
        seconds = self._marks[-1][0] - self.started
        return (self.done - self._first) / seconds if self.done > self._first and seconds > 0 else None

    @property
    def eta(self) -> float | None:
        """Seconds to go; None when the total or the rate is unknown."""
        if self.total is None or not self.rate:
            return None
        waited = self._clock() - self._marks[-1][0]
        return max(0.0, (self.total - self.done) / self.rate - waited)

    def parts(self, last: bool = False) -> list[tuple[int, str]]:
        """List the texts of the bar's line as (rank, text): when room is short, the highest rank goes first."""
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        if self.total is None and not self.description.endswith(f"{self.unit}s"):
            count = format_count(self.done, self.unit)
        parts = [(0, f"{self.description} {count}")]
        parts += [(index + 2, format_field(name, value)) for index, (name, value) in enumerate(self.fields.items())]
        rate = self.mean_rate if last else self.rate
        if rate:
            parts.append((len(self.fields) + 3, format_rate(rate, self.unit)))
        if last:
            whole = not self.stopped and (self.total is None or self.done >= self.total)
            # What an inner bar leaves on the screen is its figures, which count more than its time.
            rank = len(self.fields) + 2 if whole and self.stays else 1
            parts.append((rank, f"{'in' if whole else 'stopped after'} {format_seconds(self.elapsed)}"))
        elif self.eta is not None:
            parts.append((1, f"ETA {format_seconds(self.eta)}"))
        elif self.total is None:
            parts.append((1, format_seconds(self.elapsed)))
        return parts

    def line(self, last: bool = False, width: int | None = None) -> str:
        """Write the bar as one line of plain text, in at most `width` columns by leaving out what does not fit."""
        parts = self.parts(last)
        return "  ".join(text for _, text in (parts if width is None else _fitting(parts, width)))

    def render(self, width: int, ascii_only: bool = False) -> Text:
        """Draw the bar in at most `width` columns, leaving out what does not fit."""
        parts = _fitting(self.parts(), width)
        head, rest = parts[0][1], "".join(f"  {text}" for _, text in parts[1:])
        room = min(BAR_WIDTH, width - len(head) - len(rest) - 2)
        line = Text(no_wrap=True, overflow="crop", end="")
        line.append(head, style="bold")
        if self.total and room >= 6:
            filled = round(room * min(1.0, self.done / self.total))
            full, empty = ("#", "-") if ascii_only else ("━", "━")
            line.append("  ").append(full * filled, style="cyan").append(empty * (room - filled), style="bright_black")
        line.append(rest)
        line.truncate(max(1, width))
        return line


def _fitting(parts: list[tuple[int, str]], width: int) -> list[tuple[int, str]]:
    """The parts of a bar's line that stay in `width` columns; the first always does."""
    kept = list(parts)
    while len(kept) > 1 and len("  ".join(text for _, text in kept)) > width:
        kept.remove(max(kept))
    return kept


class _Display:
    """Shows all open bars: as one live block on a terminal, line by line elsewhere."""

    def __init__(self) -> None:
        self._bars: list[Bar] = []
        self._live: Live | None = None

    def open(self, bar: Bar) -> None:
        self._bars.append(bar)
        if self._live is None and _live_terminal() and not console.quiet:
            # What is printed to a terminal's stdout must go above the bars; a redirected stdout is left alone.
            self._live = Live(
                get_renderable=self._render,
                console=console,
                refresh_per_second=5,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()

    def changed(self, bar: Bar, now: float) -> None:
        if self._live is not None:
            return
        wait = PLAIN_DELAY if bar.printed_at is None and bar is self._bars[0] else PLAIN_INTERVAL
        waited = now - (bar.started if bar.printed_at is None else bar.printed_at)
        # The closing line says the same as a line for the last unit would.
        if bar.done != bar.total and waited >= wait:
            bar.printed_at = now
            say(bar.line())

    def close(self, bar: Bar) -> None:
        outermost = bar is self._bars[0]
        self._bars.remove(bar)
        leaves, width = outermost or bar.stays or self._live is None, None
        if self._live is not None:
            width = console.width - 1
            if outermost:
                self._live.stop()
                self._live = None
        if leaves and not bar.never_began:
            say(bar.line(last=True, width=width))

    def _render(self) -> Text:
        # A row is kept free, since some terminals wrap at the last column.
        lines = [bar.render(console.width - 1, console.options.ascii_only) for bar in list(self._bars)]
        return Text("\n").join(lines)


_display = _Display()


def _live_terminal() -> bool:
    """Tell whether stderr is a terminal that can redraw. FORCE_COLOR alone makes no terminal of a pipe."""
    return console.is_interactive and not console.is_dumb_terminal and console.file.isatty()


def format_field(name: str, value: Any) -> str:
    """Write one field of a bar: `loss 1.2345`, `812 tok/s`."""
    name = _SHORT_NAMES.get(name, name)
    return f"{format_number(value)} {name}" if name.endswith("/s") else f"{name} {format_value(value)}"


def format_value(value: Any) -> str:
    """Write a value for people: `1.2345`, `1.00e-05`, `1,234`; text as it is, numbers of NumPy as Python's."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4f}"
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:,.0f}"


def format_number(value: float) -> str:
    """Write a number with about three significant digits: `0.52`, `1.93`, `19.3`, `193`, `4,210`."""
    if not math.isfinite(value):
        return str(value)
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}"


def format_count(count: int, unit: str) -> str:
    """Write a count with its unit: `1 row`, `3,000 rows`, `8 batches`."""
    plural = "" if count == 1 else "es" if unit.endswith(("ch", "s", "x")) else "s"
    return f"{count:,} {unit}{plural}"


def format_rate(rate: float, unit: str) -> str:
    """Write units per second, or seconds per unit when units are slow: `1.93 step/s`, `19.7 s/step`."""
    return f"{format_number(rate)} {unit}/s" if rate >= 0.1 else f"{format_number(1 / rate)} s/{unit}"


def format_seconds(seconds: float) -> str:
    """Write a duration: `0:46`, `12:03`, `1:02:03`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
