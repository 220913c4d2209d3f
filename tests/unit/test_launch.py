"""Starting ranks: environment, output, failures, and that nothing is left behind."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from preloaded import Process

ROOT = Path(__file__).resolve().parents[2]


def run(nproc, program, grace, options):
    from sglang_symm.distributed.launch import run_ranks

    return run_ranks(nproc, [sys.executable, "-c", program], grace=grace, **options)


def start(nproc, program, grace=1.0, **options):
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return Process(run, nproc, program, grace, options, env=env | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"})


def launch(nproc, program, **kwargs):
    child = start(nproc, program, **kwargs)
    out, err = child.communicate(timeout=60)
    return child.returncode, out, err


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_every_rank_gets_its_place_as_torchrun_sets_it():
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR"
    code, out, err = launch(2, f"import os; print([os.environ[name] for name in '{names}'.split()])")
    assert code == 0, err
    assert out == "['0', '0', '2', '2', '127.0.0.1']\n"
    assert "[rank 1] ['1', '1', '2', '2', '127.0.0.1']\n" in err


def test_ranks_meet_in_the_store_of_the_parent():
    program = """
import torch, torch.distributed as dist
from sglang_symm.distributed.launch import under_launcher
assert under_launcher()
dist.init_process_group("gloo")
x = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(x)
dist.get_rank() or print(x.item())
dist.destroy_process_group()  # else gloo's threads end after the interpreter, at times by terminate()
"""
    code, out, err = launch(2, program)
    assert (code, out) == (0, "3.0\n"), err


def test_stdout_of_rank_0_passes_and_all_else_goes_to_stderr_with_the_rank_before_each_line():
    program = """
import os, sys
rank = os.environ['RANK']
print('out', rank)
print('err', rank, file=sys.stderr)
sys.stderr.write('end')
"""
    code, out, err = launch(2, program)
    assert (code, out) == (0, "out 0\n")
    assert sorted(err.splitlines()) == sorted(
        ["[rank 0] err 0", "[rank 0] end", "[rank 1] out 1", "[rank 1] err 1", "[rank 1] end"]
    )


def test_a_progress_bar_has_the_rank_once_and_moves():
    program = r"import os; os.environ['RANK'] == '1' and os.write(2, b'\rhalf\rall\n')"
    code, _, err = launch(2, program)
    assert (code, err) == (0, "\n[rank 1] half\n[rank 1] all\n")


def test_the_first_failure_ends_the_others_and_gives_the_exit_code():
    program = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(100)"
    begin = time.monotonic()
    code, _, err = launch(3, program, grace=0.5)
    assert code == 7
    assert "rank 1 exited with code 7" in err
    assert time.monotonic() - begin < 30


def test_nothing_is_said_of_other_ranks_where_there_are_none_or_of_a_code_that_the_ranks_explain():
    code, _, err = launch(1, "import sys; sys.exit(7)")
    assert (code, err) == (7, "sglang_symm: rank 0 exited with code 7\n")
    code, _, err = launch(2, "import sys; sys.exit(2)", quiet=(2,))
    assert (code, err) == (2, "")


def test_a_rank_killed_by_a_signal_is_named():
    program = "import os, time; os.environ['RANK'] == '0' and os.kill(os.getpid(), 11); time.sleep(100)"
    code, _, err = launch(2, program, grace=0.5)
    assert code == 128 + signal.SIGSEGV
    assert "rank 0 was killed by SIGSEGV" in err


def test_after_a_failure_the_others_have_time_to_say_what_they_missed():
    program = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(1); time.sleep(0.5); print('missed rank 1')"
    code, out, _ = launch(2, program, grace=20)
    assert (code, out) == (1, "missed rank 1\n")


def test_a_rank_that_ignores_sigterm_is_killed():
    program = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.environ['RANK'] == '1' and (time.sleep(1), sys.exit(1))
time.sleep(100)
"""
    assert launch(2, program, grace=0.3)[0] == 1


def test_a_time_out_ends_all_ranks_with_code_124():
    code, _, err = launch(2, "import time; time.sleep(100)", timeout=2, grace=0.5)
    assert code == 124
    assert "not finished after 2 s" in err


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_an_interrupted_or_killed_launcher(stop, tmp_path):
    program = f"""
import os, time
with open(r'{tmp_path}/' + os.environ['RANK'] + '.part', 'w') as file: file.write(str(os.getpid()))
os.rename(file.name, file.name[:-5])
time.sleep(100)
"""
    launcher = start(2, program)
    wait_until(lambda: all((tmp_path / str(rank)).exists() for rank in range(2)))
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert all(alive(pid) for pid in pids)
    launcher.send_signal(stop)
    launcher.communicate(timeout=30)
    assert launcher.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[stop]
    wait_until(lambda: not any(alive(pid) for pid in pids), seconds=5)


def test_no_ranks_are_refused():
    from sglang_symm.distributed.launch import run_ranks

    with pytest.raises(ValueError, match="at least 1 rank, got 0"):
        run_ranks(0, ["true"])
