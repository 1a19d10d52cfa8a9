"""What tests of commands rely on: one that is forked says what a fresh one says, and it is shown where its test fails."""

import os
from pathlib import Path

import pytest

from tests import conftest
from tests.processes import Command, fresh, ran, told


@pytest.mark.parametrize("arguments", [("db", "--help"), ("train", "--layer", "1", "--layers", "2")], ids=" ".join)
def test_a_forked_command_says_and_returns_what_a_fresh_one_does(arguments: tuple[str, ...], tmp_path: Path) -> None:
    env = os.environ | {"HEADSCOPE_DATA": str(tmp_path), "COLUMNS": "100"}
    forked, alone = ran(*arguments, env=env), fresh(*arguments, env=env)
    assert (forked.returncode, forked.stdout, forked.stderr) == (alone.returncode, alone.stdout, alone.stderr)
    assert alone.stdout or alone.stderr


def test_what_a_command_said_is_shown_where_its_test_fails(tmp_path: Path) -> None:
    commands = [Command("no-such-command"), Command("none-either", stdout=tmp_path / "said")]
    assert [command.wait(120) for command in commands] == [2, 2]
    for failed in (True, False):
        hook = conftest.pytest_runtest_makereport()
        next(hook)
        report = pytest.TestReport("here", ("here", 0, "here"), {}, "failed" if failed else "passed", None, "call")
        with pytest.raises(StopIteration):
            hook.send(report)
        assert report.sections == (list(told()) if failed else [])
    shown = dict(told())
    assert "No such command 'no-such-command'" in shown["said by headscope no-such-command (2)"]
    assert "No such command 'none-either'" in shown["said by headscope none-either (2)"]
