"""Fleets on Dask: the same results on a cluster, whoever is lost on the way."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from holds import OF_THIS_RUN, skip_unless_slow
from test_stress import small, write
from test_stress_log import KILLED, descendants, end_group, finish, guests_in, started, undisturbed, wait_for

from gmemcore.stress import distributed
from gmemcore.stress.distributed import Cluster, ClusterError
from gmemcore.stress.run import run
from gmemcore.stress.work import ChunkResult

pytest.importorskip("distributed")
pytestmark = [
    pytest.mark.timeout(180),
    # Sockets of a scheduler that is gone are closed by whoever collects them.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

SPEC = {"guests": 12, "operations": 150, "guest__vm_types": ["SNP", "TDX"], "chunks": {"guests": 1}}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process(*arguments):
    """A process of its own that ends with the test, whatever happens."""
    inherited = {name: value for name, value in os.environ.items() if name not in OF_THIS_RUN}
    environment = {**inherited, "DASK_DISTRIBUTED__WORKER__DAEMON": "True", "NUMBA_NUM_THREADS": "1"}
    started_ = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        yield started_
    finally:
        end_group(started_)


def answers(port):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def cluster(workers):
    """A scheduler and workers as processes of their own: its address, and the processes."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    with ExitStack() as stack:
        options = ("--host", "127.0.0.1", "--port", str(port), "--dashboard-address", "127.0.0.1:0")
        scheduler = stack.enter_context(process("distributed.cli.dask_scheduler", *options))
        assert wait_for(lambda: answers(port), scheduler)
        worker = ("distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
        processes = [stack.enter_context(process(*worker, "--host", "127.0.0.1")) for _ in range(workers)]
        yield address, scheduler, processes


def worker_processes(pid):
    """Processes of a LocalCluster's workers."""
    found = []
    for child in descendants(pid):
        words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        found += [child] if any(b"spawn_main" in word for word in words) else []
    return found


@pytest.fixture(scope="module")
def one_worker():
    with cluster(1) as (address, _, _):
        yield address


def test_two_processes_give_what_one_gives_though_one_is_killed():
    made = small(**SPEC)
    alone = run(made)
    killed = []

    def watch(state):
        if len(state.merger.results) >= made.total // 3 and not killed:
            killed.append(worker_processes(os.getpid())[0])
            os.kill(killed[0], signal.SIGKILL)

    many = run(made, runner=Cluster(2), workers=2, watch=watch)
    assert killed
    assert many.merger.all.digest == alone.merger.all.digest
    assert {n: one.digest for n, one in many.merger.results.items()} == {
        n: one.digest for n, one in alone.merger.results.items()
    }


def test_a_scheduler_and_two_workers_by_address_one_of_them_killed_at_a_quarter():
    made = small(**SPEC)
    with cluster(2) as (address, _, workers):
        killed = []

        def watch(state):
            if len(state.merger.results) >= made.total // 4 and not killed:
                os.killpg(workers[0].pid, signal.SIGKILL)
                killed.append(len(state.merger.results))

        done = run(made, runner=Cluster(scheduler=address, patience=60), watch=watch)
        assert killed
        assert workers[1].poll() is None
    assert done.merger.complete
    assert done.merger.all.digest == run(made).merger.all.digest


def test_a_violation_comes_back(one_worker, monkeypatch):
    from gmemcore.stress.guest import Violation

    found = Violation(3, 7, "broken")
    monkeypatch.setattr(
        distributed, "decode_chunk", lambda text: ChunkResult(distributed.code_id(), [], found)
    )
    done = run(small(**SPEC), runner=Cluster(scheduler=one_worker))
    assert done.violation == found
    assert not done.merger.complete


def test_another_gmemcore_is_told_apart(one_worker, monkeypatch):
    monkeypatch.setattr(distributed, "code_id", lambda: "0.0.1 (other)")
    with pytest.raises(ClusterError, match=r"a worker runs gmemcore 0\.\d.*; this is 0\.0\.1 \(other\)"):
        run(small(**SPEC), runner=Cluster(scheduler=one_worker))


def test_workers_without_gmemcore_and_chunks_that_fail(one_worker, monkeypatch):
    monkeypatch.setattr(distributed, "run_chunk", eval_on_worker("ModuleNotFoundError"))
    with pytest.raises(ClusterError, match="a worker has no gmemcore"):
        run(small(**SPEC), runner=Cluster(scheduler=one_worker))
    monkeypatch.setattr(distributed, "run_chunk", eval_on_worker("ValueError"))
    with pytest.raises(ClusterError, match=r"guests \d+ to \d+ failed 5 times: ValueError"):
        run(
            small(
                **SPEC,
            ),
            runner=Cluster(scheduler=one_worker),
        )


def eval_on_worker(error):
    """A function that a worker can make of its source alone, and that fails there."""
    scope = {}
    exec(f"def fails(*_):\n    raise {error}('there')", scope)  # travels by value
    return scope["fails"]


def test_nobody_there_is_told_soon():
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"no scheduler answers at tcp://127\.0\.0\.1:"):
        run(small(), runner=Cluster(scheduler=f"tcp://127.0.0.1:{free_port()}", patience=1))
    assert time.monotonic() - began < 60


def test_a_cluster_without_workers_is_given_up():
    with cluster(0) as (address, _, _), pytest.raises(ClusterError, match="has no worker for 1 s; --resume"):
        run(small(), runner=Cluster(scheduler=address, patience=1))


@pytest.mark.parametrize("address", ["foo", "host:8786", "tcp://host", "http://host:80", ""])
def test_an_address_that_is_none_is_refused_at_once(address):
    with pytest.raises(ClusterError, match="tcp:// or tls://HOST:PORT would be accepted"):
        Cluster(scheduler=address)


def test_a_scheduler_that_goes_away_ends_the_run():
    made = small(**{**SPEC, "guests": 50, "operations": 2000})
    with cluster(1) as (address, scheduler, _):

        def watch(state):
            if len(state.merger.results) == 2:
                os.killpg(scheduler.pid, signal.SIGKILL)

        with pytest.raises(ClusterError, match="--resume goes on from here"):
            run(made, runner=Cluster(scheduler=address, patience=2), watch=watch)


def test_tls_files_are_passed_through(tmp_path):
    files = [tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem")]
    for file in files:
        file.write_text("x")
    security = Cluster(2, "tls://h:1", *files)._security()
    assert security.require_encryption
    assert (security.tls_ca_file, security.tls_client_cert, security.tls_client_key) == tuple(map(str, files))
    assert Cluster(2, "tls://h:1")._security() is None


def test_without_dask_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"pip install 'gmemcore\[distributed\]'"):
        Cluster(2)


# ---- kills ---------------------------------------------------------------------------------------


def kill_workers(path, digest, kills, choose):
    """Kill workers of a running command at random times; it must go on by itself and end well."""
    log, done = path.with_suffix(".log"), 0
    while done < kills:
        log.unlink(missing_ok=True)
        running = started(path, "--workers", "2")
        try:
            seen = 0
            while done < kills:
                more = choose.randrange(1, 4)
                if not wait_for(lambda seen=seen, more=more: guests_in(log) >= seen + more, running):
                    break
                seen = guests_in(log)
                workers = worker_processes(running.pid)
                if workers:
                    os.kill(choose.choice(workers), signal.SIGKILL)
                    done += 1
            out, err = running.communicate(timeout=120)
        finally:
            end_group(running)
        assert running.returncode == 0, err
        assert out.splitlines()[-1] == digest
    return done


@pytest.mark.timeout(1800)
def test_fifty_kills_of_workers_and_drivers(tmp_path, request):
    skip_unless_slow(request)
    path = write(tmp_path / "fleet.toml", **{**KILLED, "guests": 40, "operations": 4000})
    digest = undisturbed(path)
    assert kill_workers(path, digest, 25, random.Random(4)) == 25
    log, choose, done = path.with_suffix(".log"), random.Random(5), 0
    while done < 25:
        log.unlink(missing_ok=True)
        alive = True
        while alive and done < 25:
            before = guests_in(log)
            driver = started(path, "--resume", "--workers", "2")
            try:
                more = choose.randrange(1, 6)
                alive = wait_for(lambda before=before, more=more: guests_in(log) >= before + more, driver)
                if alive:
                    os.kill(driver.pid, signal.SIGKILL)
                    done += 1
            finally:
                end_group(driver)
        assert finish(path, "--workers", "2") == digest
