"""Progress in a log: plain lines, not too many."""

from utils import progress


def test_a_log_gets_plain_lines_with_an_estimate(capsys, monkeypatch):
    now = iter([0.0, 5.0, 20.0, 21.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.Bar("timing", 8, "runs") as bar:
        for number in range(4):
            bar.step(2, note=f"number {number}")
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "timing: 4/8 runs, 20 s left, number 1",
        "timing: 8/8 runs, 0 s left, number 3",
    ]
    assert printed.err == ""


def test_short_work_prints_nothing(capsys):
    with progress.Bar("short", 3) as bar:
        for _ in range(3):
            bar.step()
    assert capsys.readouterr() == ("", "")


def test_control_characters_do_not_reach_the_terminal(capsys):
    """ESC ] 0 changes the window's title, U+202E the text direction; U+DCFF is a surrogate."""
    progress.say("line\nanother\tTür \x1b]0;title\x07 \u202e \udcff")
    assert capsys.readouterr().out == "line\nanother\tTür ?]0;title? ? ?\n"
