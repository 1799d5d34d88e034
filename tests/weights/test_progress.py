"""The bar is for terminals only."""

from __future__ import annotations

import pytest

from vizattn.weights.progress import shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_only(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    with shown("w[1].pth") as show:
        show(1_500_000, 3_000_000)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("w[1].pth" in printed.err and "1.5/3.0 MB" in printed.err) if terminal else printed.err == ""
