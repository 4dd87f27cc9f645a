"""Fleets on Dask: the same results on a cluster, whoever is lost or silent, and doors that are locked."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest

from gmemcore.stress import distributed
from gmemcore.stress.distributed import Cluster, DaskLink
from gmemcore.stress.guest import Violation
from gmemcore.stress.link import ClusterError, Ended, Failed
from gmemcore.stress.run import run
from gmemcore.stress.work import ChunkResult, code_id
from support.fleets import end_group, guests_in, small, started, undisturbed, wait_for, write

pytest.importorskip("distributed")
pytestmark = [
    pytest.mark.timeout(180),
    # Sockets of a scheduler that is gone are closed by whoever collects them.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

SPEC = {"guests": 12, "operations": 150, "guest__vm_types": ["SNP", "TDX"], "chunks": {"guests": 1}}
LONG = {"guests": 300, "operations": 3000, "checks": {}, "faults": {}, "chunks": {"guests": 1}}
"""More than a test waits for."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process(*arguments):
    """A process of its own that ends with the test, whatever happens."""
    environment = {**os.environ, "DASK_DISTRIBUTED__WORKER__DAEMON": "True", "NUMBA_NUM_THREADS": "1"}
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
def cluster(workers, threads=1, tls=()):
    """A scheduler and workers as processes of their own: its address, and the processes."""
    port = free_port()
    scheme = "tls" if tls else "tcp"
    address, host = f"{scheme}://127.0.0.1:{port}", f"{scheme}://127.0.0.1"
    with ExitStack() as stack:
        options = ("--host", host, "--port", str(port), "--dashboard-address", "127.0.0.1:0", *tls)
        scheduler = stack.enter_context(process("distributed.cli.dask_scheduler", *options))
        assert wait_for(lambda: answers(port), scheduler)
        worker = ("distributed.cli.dask_worker", address, "--nthreads", str(threads), "--no-nanny")
        worker += ("--no-dashboard", "--host", host, *tls)
        processes = [stack.enter_context(process(*worker)) for _ in range(workers)]
        yield address, scheduler, processes


@pytest.fixture(scope="module")
def one_worker():
    with cluster(1, threads=2) as (address, _, _):
        yield address


# ---- results -----------------------------------------------------------------------------------------


def test_a_cluster_gives_what_one_process_gives_though_a_worker_is_killed():
    made = small(**SPEC)
    with cluster(2) as (address, _, workers):
        killed = []

        def watch(state):
            if len(state.merger.results) >= made.total // 4 and not killed:
                os.killpg(workers[0].pid, signal.SIGKILL)
                killed.append(len(state.merger.results))

        done = run(made, runner=Cluster(address), watch=watch)
        assert killed
        assert workers[1].poll() is None
    assert done.merger.complete
    assert done.merger.all.digest == run(made).merger.all.digest


def test_a_violation_comes_back(one_worker, monkeypatch):
    found = Violation(3, 7, "broken")
    monkeypatch.setattr("gmemcore.stress.dispatch.decode_chunk", lambda _: ChunkResult(code_id(), [], found))
    done = run(small(**SPEC), runner=Cluster(one_worker))
    assert done.violation == found
    assert not done.merger.complete


def test_another_gmemcore_is_told_apart(one_worker, monkeypatch):
    monkeypatch.setattr(distributed, "code_id", lambda: "0.0.1 (other)")
    with pytest.raises(ClusterError, match=r"a worker runs gmemcore 0\.\d.*, not 0\.0\.1 \(other\)"):
        run(small(**SPEC), runner=Cluster(one_worker))


def test_workers_without_gmemcore_and_chunks_that_fail(one_worker, monkeypatch):
    monkeypatch.setattr(distributed, "run_chunk", eval_on_worker("ModuleNotFoundError"))
    with pytest.raises(ClusterError, match="a worker has no gmemcore"):
        run(small(**SPEC), runner=Cluster(one_worker))
    monkeypatch.setattr(distributed, "run_chunk", eval_on_worker("ValueError"))
    with pytest.raises(ClusterError, match=r"guest \d+ failed 5 times: ValueError: there"):
        run(small(**SPEC), runner=Cluster(one_worker))


def eval_on_worker(error):
    """A function that a worker can make of its source alone, and that fails there."""
    scope = {}
    exec(f"def fails(*_):\n    raise {error}('there')", scope)  # travels by value
    return scope["fails"]


# ---- silence -----------------------------------------------------------------------------------------


@contextmanager
def mute_port():
    """A port that accepts connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def test_nobody_there_is_told_soon():
    address = f"tcp://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(ClusterError, match=rf"at {address}.* (hasn't answered|Timed out)"):
        run(small(), runner=Cluster(address, patience=1))
    assert time.monotonic() - began < 60


def test_a_scheduler_that_accepts_and_says_nothing_is_given_up():
    with mute_port() as address:
        began = time.monotonic()
        with pytest.raises(ClusterError, match=f"the scheduler at {address} hasn't answered for 2 s"):
            run(small(), runner=Cluster(address, patience=2))
        assert time.monotonic() - began < 60


def test_a_cluster_without_workers_is_given_up():
    with (
        cluster(0) as (address, _, _),
        pytest.raises(ClusterError, match="has had no worker that responds for"),
    ):
        run(small(), runner=Cluster(address, patience=8))


@pytest.mark.parametrize("who", ["workers stopped", "scheduler stopped", "scheduler killed"])
def test_a_cluster_that_falls_silent_is_given_up_and_loses_nothing(tmp_path, who):
    path = write(tmp_path / "fleet.toml", **LONG)
    log = path.with_suffix(".log")
    with cluster(2) as (address, scheduler, workers):
        command = started(path, "--scheduler", address, "--patience", "10")
        try:
            assert wait_for(lambda: guests_in(log) >= 4, command, 120)
            for each in workers if who.startswith("workers") else [scheduler]:
                os.killpg(each.pid, signal.SIGKILL if who.endswith("killed") else signal.SIGSTOP)
            out, err = command.communicate(timeout=90)
        finally:
            end_group(command)
    assert (command.returncode, out) == (2, "")
    assert "Traceback" not in err
    assert f"--resume continues from {log}" in err.splitlines()[-1]
    before = guests_in(log)
    resumed = started(path, "--resume")
    try:
        assert wait_for(lambda: guests_in(log) > before, resumed)
    finally:
        end_group(resumed)


def test_the_other_worker_goes_on_when_one_is_stopped(tmp_path):
    path = write(tmp_path / "fleet.toml", **{**LONG, "guests": 40})
    log = path.with_suffix(".log")
    with cluster(2) as (address, _, workers):
        command = started(path, "--scheduler", address, "--patience", "12")
        try:
            assert wait_for(lambda: guests_in(log) >= 4, command, 120)
            os.killpg(workers[0].pid, signal.SIGSTOP)
            out, err = command.communicate(timeout=200)
        finally:
            end_group(command)
    assert command.returncode == 0, err
    assert out.splitlines()[-1] == undisturbed(path)


def test_results_do_not_wait_for_those_of_a_worker_that_is_stopped():
    """A worker may be stopped when its results are about to be fetched."""
    from distributed import LocalCluster

    made = small(**SPEC)
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "protocol": "tcp://"}
    with LocalCluster(**options, host="127.0.0.1", dashboard_address=None) as local:
        stopped, other = (worker.address for worker in local.workers.values())
        scheduler = local.scheduler
        gather = scheduler.handlers["gather"]

        async def held_up(keys, **options):
            if any(stopped in places for places in scheduler.get_who_has(keys).values()):
                await asyncio.Event().wait()
            return await gather(keys=keys, **options)

        scheduler.handlers["gather"] = held_up
        with DaskLink(Cluster(local.scheduler_address), made.encode(), code_id()) as link:

            def ended(task):
                return any(isinstance(event, Ended) and event.task == task for event in link.events(0.1))

            for task in range(7):
                link.submit(stopped, task, [task])
            assert wait_for(lambda: [task.state for task in [*scheduler.tasks.values()]] == ["memory"] * 7)
            link.submit(other, 7, [7])
            assert wait_for(lambda: ended(7))
            link.submit(other, 8, [8])
            for task in range(7):
                link.forget(task)
            assert wait_for(lambda: ended(8))


@pytest.mark.parametrize("alive", [True, False])
def test_a_chunk_whose_worker_died_with_its_result_is_reported_as_lost(alive):
    """It has run, so the guests aren't to blame: they run again elsewhere."""
    key, done = "chunk", b"result"
    answers = {True: {"status": "OK", "data": {key: done}}, False: {"status": "error", "keys": [key]}}

    async def nothing():
        return None

    async def gather(keys):
        assert keys == [key]
        return answers[alive]

    released = []
    future = SimpleNamespace(key=key, exception=nothing, release=lambda: released.append(key))
    link = DaskLink(Cluster("tcp://127.0.0.1:1"), b"", code_id())
    link._client = SimpleNamespace(scheduler=SimpleNamespace(gather=gather))
    asyncio.run(link._collect(4, future))
    expected = Ended(4, done) if alive else Failed(4, "its worker died", gone=True)
    assert link.events(0) == [expected]
    assert released == [key]


def test_the_scheduler_says_that_a_result_was_lost():
    """What `test_a_chunk_whose_worker_died_with_its_result_is_reported_as_lost` takes for granted."""
    from distributed import Client, LocalCluster

    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with LocalCluster(**options) as local, Client(local) as client:
        future = client.submit(int, "7")
        assert future.result() == 7
        client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.tasks[future.key].who_has.clear())
        found = client.sync(client.scheduler.gather, keys=[future.key])
        assert found["status"] != "OK"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_without_a_word_of_dask(tmp_path, number):
    path = write(tmp_path / "fleet.toml", **LONG)
    log = path.with_suffix(".log")
    with cluster(1) as (address, _, _):
        command = started(path, "--scheduler", address)
        try:
            assert wait_for(lambda: guests_in(log) >= 2, command, 120)
            os.killpg(command.pid, number)
            _, err = command.communicate(timeout=60)
        finally:
            end_group(command)
    assert all(line.startswith("gmemcore stress: ") for line in err.splitlines()), err
    if number == signal.SIGINT:
        assert command.returncode == 130
        assert (
            err.splitlines()[-1]
            == f"gmemcore stress: interrupted; --resume continues from {path.with_suffix('.log')}"
        )


def test_an_interruption_while_it_connects_is_a_line(tmp_path):
    path = write(tmp_path / "fleet.toml", **SPEC)
    with mute_port() as address:
        command = started(path, "--scheduler", address)
        try:
            wait_for(lambda: "0 of 24 guests" in command.stderr.readline(), command)
            time.sleep(1)
            os.killpg(command.pid, signal.SIGINT)
            _, err = command.communicate(timeout=60)
        finally:
            end_group(command)
    assert command.returncode == 130
    assert (
        err.splitlines()[-1]
        == f"gmemcore stress: interrupted; --resume continues from {path.with_suffix('.log')}"
    )


# ---- addresses and certificates ------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["foo", "host:8786", "tcp://host", "http://host:80", ""])
def test_an_address_that_is_none_is_refused_at_once(address):
    with pytest.raises(ClusterError, match="must be tcp://HOST:PORT or tls://HOST:PORT, not"):
        Cluster(address)


def test_only_a_client_with_the_certificate_reaches_a_scheduler_with_tls(tmp_path):
    from distributed import Security

    made = Security.temporary()
    files = {"ca-file": made.tls_ca_file, "cert": made.tls_client_cert, "key": made.tls_client_key}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    tls = tuple(word for name in files for word in (f"--tls-{name}", str(tmp_path / name)))
    path = write(tmp_path / "fleet.toml", **SPEC)
    with cluster(1, tls=tls) as (address, _, _):
        command = started(path, "--scheduler", address, *tls)
        out, err = command.communicate(timeout=120)
        assert command.returncode == 0, err
        assert "warning" not in err
        assert out.splitlines()[-1] == undisturbed(path)

        with pytest.raises(ClusterError, match="needs --tls-ca-file, --tls-cert and --tls-key"):
            run(small(), runner=Cluster(address, patience=20))

        assert ask_identity(made, address)["type"] == "Scheduler"
        for stranger, scheme in ((Security.temporary(), "tls"), (Security(), "tls"), (Security(), "tcp")):
            with pytest.raises((OSError, TimeoutError, TypeError)):
                ask_identity(stranger, address.replace("tls", scheme))


def ask_identity(security, address):
    """What anybody who gets through to a scheduler is answered."""
    from distributed.comm import connect

    async def ask():
        comm = await connect(address, timeout=3, **security.get_connection_args("client"))
        try:
            await comm.write({"op": "identity", "reply": True})
            return await comm.read()
        finally:
            comm.abort()

    return asyncio.run(asyncio.wait_for(ask(), 10))


def test_tls_files_are_passed_through(tmp_path):
    files = [tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem")]
    for file in files:
        file.write_text("x")
    security = Cluster("tls://h:1", *files).security()
    assert security.require_encryption
    assert (security.tls_ca_file, security.tls_client_cert, security.tls_client_key) == tuple(map(str, files))
    assert Cluster("tls://h:1").security() is None


def test_a_scheduler_without_tls_is_warned_of_once(tmp_path):
    path = write(tmp_path / "fleet.toml", **SPEC)
    command = started(path, "--scheduler", f"tcp://127.0.0.1:{free_port()}", "--patience", "0.2")
    _, err = command.communicate(timeout=60)
    [warning] = [line for line in err.splitlines() if "warning" in line]
    assert "tcp:// is neither encrypted nor authenticated: whoever reaches the scheduler" in warning


def test_without_dask_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"pip install 'gmemcore\[distributed\]'"):
        Cluster("tcp://h:1")
