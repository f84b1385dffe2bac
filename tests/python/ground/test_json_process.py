"""Work in other processes: their answers, and what is known of those that give none."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from penstock.json_process import run_for_json
from python.support import run_python


def run(code: str, time_limit: float = 60) -> dict[str, object]:
    return run_for_json([sys.executable, "-c", code], time_limit)


def test_the_last_line_is_the_answer() -> None:
    assert run("print('other'); print('{\"a\": [1, null]}')") == {"a": [1, None]}


def test_what_ends_without_an_answer_says_how() -> None:
    found = run("import sys; print([1]); sys.exit('the reason')")
    assert found["failed"] == "exit code 1: the reason"
    assert run("pass")["failed"] == "exit code 0"
    found = run("import os, signal; os.kill(os.getpid(), signal.SIGABRT)")
    assert found["failed"] == "ended by signal SIGABRT"
    assert run(r"import os; os.write(2, b'\xff'); os._exit(2)")["failed"] == "exit code 2: \ufffd"


def test_a_process_whose_child_holds_its_pipes_ends_in_time(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = f"""if True:
        import subprocess
        child = subprocess.Popen(["sleep", "100"], start_new_session=True)
        open({str(file)!r}, "w").write(str(child.pid))
        print({{}})
    """
    start = time.monotonic()
    found = run(code, time_limit=3)
    assert found == {"failed": "not done after 3 s"}
    assert time.monotonic() - start < 60
    os.kill(int(file.read_text()), signal.SIGKILL)


def test_errors_are_answers_and_go_where_they_are_wanted() -> None:
    code = """
        import os, sys
        from penstock.json_process import answer
        def fail(): raise ValueError("no")
        def tell(): return {"path": os.path}
        assert answer(fail, to=sys.stderr) == 1
        assert answer(tell) == 0
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    assert '"path": "<module' in run_python(lines)
    assert run("from penstock.json_process import answer; answer(lambda: 1 / 0)")["failed"] == (
        "ZeroDivisionError: division by zero"
    )
