"""Lines, tables and bars, in plain text and on a terminal."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from finetune import console


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(console.Bar.__init__, "__defaults__", ("step", 0, clock, False))
    return clock


@pytest.fixture
def terminal(monkeypatch):
    file = Terminal()
    monkeypatch.setattr(console, "console", Console(file=file, force_terminal=True, width=100, highlight=False))
    return file


@pytest.fixture(autouse=True)
def forget_warnings():
    console._warned.clear()


def lines(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_plain_lines_of_a_run(capsys, clock):
    with console.progress(12, "train") as bar:
        for _ in range(12):
            clock.sleep(2.0)
            bar.advance(loss=1.2345, tokens_per_second=812.4)
    assert lines(capsys) == [
        "train 1/12  loss 1.2345  812 tok/s  0.50 step/s  ETA 0:22",
        "train 4/12  loss 1.2345  812 tok/s  0.50 step/s  ETA 0:16",
        "train 7/12  loss 1.2345  812 tok/s  0.50 step/s  ETA 0:10",
        "train 10/12  loss 1.2345  812 tok/s  0.50 step/s  ETA 0:04",
        "train 12/12  loss 1.2345  812 tok/s  0.50 step/s  in 0:24",
    ]


def test_quick_work_leaves_one_line(capsys, clock):
    with console.progress(8400, "read", "row") as bar:
        for _ in range(8400):
            clock.sleep(1 / 16800)
            bar.advance()
    assert lines(capsys) == ["read 8,400/8,400  16,800 row/s  in 0:01"]


def test_an_unknown_total_shows_time_instead_of_eta(capsys, clock):
    with console.progress(None, "read", "row") as bar:
        for _ in range(3):
            clock.sleep(4.0)
            bar.advance(500)
    assert lines(capsys) == [
        "read 500 rows  125 row/s  0:04",
        "read 1,500 rows  125 row/s  0:12",
        "read 1,500 rows  125 row/s  in 0:12",
    ]


def test_work_that_ends_early_says_so(capsys, clock):
    with console.progress(10, "train") as bar:
        clock.sleep(1)
        bar.advance(4)
    assert lines(capsys) == ["train 4/10  4.00 step/s  stopped after 0:01"]


def test_a_bar_that_is_stopped_at_once_leaves_the_word_to_what_stopped_it(capsys, clock):
    for seconds, said in ((1.0, []), (100.0, ["read rows 0  stopped after 1:40"])):
        with pytest.raises(FileNotFoundError), console.progress(None, "read rows", "row"):
            clock.now += seconds
            raise FileNotFoundError
        assert lines(capsys) == said


def test_a_unit_in_the_description_is_not_repeated(capsys, clock):
    for description in ("read", "read training rows"):
        with console.progress(None, description, "row") as bar:
            clock.sleep(0.5)
            bar.advance(1)
    assert lines(capsys) == ["read 1 row  2.00 row/s  in 0:01", "read training rows 1  2.00 row/s  in 0:01"]


def test_an_inner_bar_waits_longer_and_both_close(capsys, clock):
    with console.progress(2, "train") as bar:
        clock.sleep(2)
        bar.advance()
        with console.progress(4, "evaluate", "batch") as inner:
            for _ in range(4):
                clock.sleep(1)
                inner.advance()
        bar.advance(loss=0.5)
    assert lines(capsys) == [
        "train 1/2  0.50 step/s  ETA 0:02",
        "evaluate 4/4  1.00 batch/s  in 0:04",
        "train 2/2  loss 0.5000  0.33 step/s  in 0:06",
    ]


def test_a_failure_closes_the_bar_and_says_so(capsys, clock):
    with pytest.raises(KeyboardInterrupt):
        with console.progress(10, "train") as bar:
            clock.sleep(3)
            bar.advance()
            raise KeyboardInterrupt
    assert lines(capsys)[-1] == "train 1/10  0.33 step/s  stopped after 0:03"


def test_work_done_before_counts_as_done_but_not_for_the_rate(capsys, clock):
    with console.progress(100, "train", done=50) as bar:
        assert bar.rate is None and bar.eta is None
        clock.sleep(10)
        bar.advance(10)
        assert bar.rate == 1.0
        assert bar.eta == 40.0
        clock.sleep(5)
        assert bar.eta == 35.0


def test_the_rate_follows_the_last_half_minute(capsys, clock):
    with console.progress(None, "train") as bar:
        for _ in range(50):
            clock.sleep(4.0)
            bar.advance()
        for _ in range(100):
            clock.sleep(0.5)
            bar.advance()
        assert bar.rate == pytest.approx(2.0, rel=0.05)
        assert len(bar._marks) < 400


def test_many_fast_units_keep_the_window_small(capsys, clock):
    with console.progress(None, "read", "row") as bar:
        for _ in range(20_000):
            clock.sleep(0.001)
            bar.advance()
        assert bar.rate == pytest.approx(1000, rel=0.01)
        assert len(bar._marks) < 1000


def test_a_field_set_to_none_goes_away():
    bar = console.Bar(1, "train")
    bar.update(loss=1.0, note="warm-up")
    bar.update(note=None)
    assert bar.fields == {"loss": 1.0}


@pytest.mark.parametrize("width", range(1, 140, 3))
def test_a_bar_fits_every_width(width, clock):
    bar = console.Bar(1000, "train", clock=clock)
    bar.update(loss=1.2345, learning_rate=1e-4, tokens_per_second=81234.0)
    bar.done = 500
    text = bar.render(width)
    assert text.cell_len <= width
    assert "\n" not in text.plain
    assert text.plain.startswith("train 500/1,000"[:width])


def test_when_room_is_short_the_bar_goes_first_and_the_eta_last(capsys, clock):
    with console.progress(100, "train") as bar:
        clock.sleep(10)
        bar.advance(10, loss=1.5, lr=1e-4)
        wide = f"train 10/100  {'#' * 3}{'-' * 27}  loss 1.5000  lr 1.00e-04  1.00 step/s  ETA 1:30"
        assert bar.render(120, ascii_only=True).plain == wide
        assert bar.render(70, ascii_only=True).plain == wide.replace("#" * 3 + "-" * 27, "#------")
        assert bar.render(61).plain == "train 10/100  loss 1.5000  lr 1.00e-04  1.00 step/s  ETA 1:30"
        assert bar.render(26).plain == "train 10/100  ETA 1:30"
        assert bar.render(12).plain == "train 10/100"
        assert bar.render(7).plain == "train 1"


def test_terminal_bars_are_live_and_leave_one_line(terminal, capsys):
    with console.progress(4, "train") as bar:
        bar.advance(2, loss=0.25)
        print("a result")
        with console.progress(2, "evaluate", "batch") as inner:
            inner.advance(2)
        console.say("eval [loss] 0.5")
        bar.advance(2)
    shown = terminal.getvalue()
    assert "eval [loss] 0.5" in shown
    assert shown.count("evaluate 2/2") <= 2
    assert "train 4/4  loss 0.2500" in shown.splitlines()[-1]
    assert console._display._live is None and console._display._bars == []
    assert capsys.readouterr().out == "a result\n"


def test_forced_colour_in_a_pipe_still_gives_plain_lines(monkeypatch, capsys):
    file = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=file, force_terminal=True, width=100, highlight=False))
    with console.progress(1, "save", "file") as bar:
        bar.advance()
    assert "\x1b[2K" not in file.getvalue() and "save 1/1" in file.getvalue()


def test_long_lines_are_not_wrapped_in_a_log(capsys):
    console.say("x" * 300)
    assert lines(capsys) == ["x" * 300]


def test_a_warning_is_given_once(capsys):
    for _ in range(3):
        console.warn("3 rows [of 10] were cut")
    console.warn("another")
    assert lines(capsys) == ["warning: 3 rows [of 10] were cut", "warning: another"]


def test_a_plain_table(capsys):
    console.table("Plan", [("rows", 1234), ("learning rate", 1e-5), ("eval", None), ("path", "[red]x")])
    assert lines(capsys) == ["Plan", "  rows           1,234", "  learning rate  1.00e-05", "  path           [red]x"]


def test_a_table_on_a_terminal(terminal):
    console.table("Plan", [("rows", 1234), ("path", "[red]x")])
    assert "1,234" in terminal.getvalue() and "[red]x" in terminal.getvalue()


def test_a_muted_console_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(console, "console", Console(stderr=True))
    console.mute()
    console.say("x")
    console.table("x", [("a", 1)])
    with console.progress(1, "train") as bar:
        bar.advance()
    assert lines(capsys) == []


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("loss", 1.23456, "loss 1.2346"),
        ("loss", np.float32(0.5), "loss 0.5000"),
        ("loss", float("nan"), "loss nan"),
        ("learning_rate", 0.00001, "lr 1.00e-05"),
        ("learning_rate", 0.0, "lr 0.0000"),
        ("tokens_per_second", 123456.7, "123,457 tok/s"),
        ("tok/s", 0.521, "0.52 tok/s"),
        ("rows", 12345, "rows 12,345"),
        ("phase", "warm-up", "phase warm-up"),
        ("norm", -12345.6, "norm -12,346"),
    ],
)
def test_fields(name, value, shown):
    assert console.format_field(name, value) == shown


@pytest.mark.parametrize(
    ("rate", "shown"),
    [
        (1.934, "1.93 step/s"),
        (19.34, "19.3 step/s"),
        (4210.4, "4,210 step/s"),
        (0.05, "20.0 s/step"),
        (0.1, "0.10 step/s"),
    ],
)
def test_rates(rate, shown):
    assert console.format_rate(rate, "step") == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (46.4, "0:46"), (59.6, "1:00"), (723, "12:03"), (3723, "1:02:03")]
)
def test_durations(seconds, shown):
    assert console.format_seconds(seconds) == shown


def test_an_inner_bar_that_stays_leaves_its_line_above_the_live_one(terminal):
    with console.progress(4, "train") as bar:
        bar.advance(1, loss=1.5, **{"rewards/accuracies": 0.75, "rewards/margins": 0.25})
        with console.progress(1, "evaluate", "batch", stays=True) as inner:
            inner.advance(1, step=1, eval_loss=0.5)
        lines = terminal.getvalue().replace("\r", "\n").splitlines()
    assert any("evaluate 1/1  step 1  eval loss 0.5000" in line for line in lines)
    assert "train 1/4  loss 1.5000  accuracy 0.7500  margin 0.2500" in bar.line()


def test_a_command_to_copy_is_left_whole(monkeypatch):
    file, command = Terminal(), "curl http://127.0.0.1:8000/v1 -H 'Content-Type: application/json'"
    monkeypatch.setattr(console, "console", Console(file=file, force_terminal=True, width=40, highlight=False))
    console.say(command, to_copy=True)
    console.say(command)
    lines = file.getvalue().splitlines()
    assert lines[0] == command and len(lines) > 2


def test_a_closing_line_fits_the_terminal(monkeypatch):
    """80 columns, and DPO has more to say: an evaluation keeps its figures, the run its end."""
    file = Terminal()
    monkeypatch.setattr(console, "console", Console(file=file, force_terminal=True, width=80, highlight=False))
    with console.progress(2, "train") as bar:
        with console.progress(3, "evaluate", "batch", stays=True) as inner:
            shown = {"eval_loss": 0.5751, "eval_rewards/accuracies": 1.0, "eval_rewards/margins": 0.7837}
            inner.advance(3, step=1000, **shown)
        bar.advance(2, tokens_per_second=123456.0, loss=0.5, **{f"field{number}": 0.25 for number in range(4)})
    plain = [Text.from_ansi(line).plain for line in file.getvalue().splitlines()]
    assert max(map(len, plain)) < 80
    assert "evaluate 3/3  step 1,000  eval loss 0.5751  accuracy 1.0000  margin 0.7837" in plain
    assert plain[-1].startswith("train 2/2") and plain[-1].endswith("  in 0:00")
