"""The bars of fleets: what ``gmemcore stress`` costs beside the bare engine, in the same run.

attributes  1,000 guests of 64 GiB without contents, 10,000 conversions each, on two workers: at least 0.6
            of the rate of a bare batch (``set_memory_attributes_many`` of the same conversions, one thread),
            in 2 GiB of memory or less, all processes together
terabytes   one guest of 16 TiB: it runs, in 2 GiB or less
deferred    1,000 guests of 64 GiB with deferred contents, encrypted and decrypted in place and held to the
            promise of PRESERVE: at least half the rate of the same fleet without contents, in 2 GiB or less
scaling     what a guest and a chunk cost outside of the guest, and how many workers that can feed; no bar
contents    4 guests of 2 GiB with contents, encrypted and decrypted in place: at least 0.7 times the rate of
            the bare batch on one guest whose memory is warm
kills       50 kills of a driver and 50 of workers and drivers, at random times: the digest of the undisturbed
            run, nothing lost and nothing twice (the long forms of tests/stress/test_stress_log.py and
            tests/stress/test_stress_processes.py)

Guests are checked as fleets are: invariants and counters at the end, and an operation of every 100,000 by the
oracle. A run starts with its workers warm: starting them is no part of a rate.

Run: ``python bench/fleet.py [BAR...]``; exit status 0 if every bar asked for is met, else 1.
"""

import argparse
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

import gmemcore
from gmemcore.engine.host import keep_freed_memory
from gmemcore.stress import spec as specs
from gmemcore.stress.processes import Processes
from gmemcore.stress.run import Run, run
from gmemcore.stress.work import code_id, run_chunk
from gmemcore.units import format_number, format_size
from gmemcore.workload.behaviours import BEHAVIOURS
from gmemcore.workload.operations import join_operations

MOST_MEMORY = 2 << 30
WORKERS = 2
CHECKS = {"oracle_every": 100_000, "invariants_every": 0}
SAMPLES = 5


def fleet(guests: int, operations: int, guest: dict, **parameters) -> specs.Spec:
    """A fleet of guests that scatter conversions."""
    return specs.check(
        {
            "guests": guests,
            "operations": operations,
            "behaviour": [{"name": "scatter", "parameters": parameters}],
            "guest": guest,
            "checks": CHECKS,
        }
    )


def conversions(spec: specs.Spec, count: int):
    """The conversions of a guest of a fleet, without the first one, which is of all its memory."""
    row = spec.behaviour[0]
    chunks, left = [], count + 1
    for chunk in BEHAVIOURS[row.name].operations(spec.layout, 0, **row.parameters):
        chunks.append(chunk[:left])
        left -= len(chunks[-1])
        if not left:
            return join_operations(chunks)[1:]
    raise AssertionError("scatter ended")


class Bare:
    """The engine's own batches on one guest that is warm, one after the other of a fleet's conversions.

    Parameters
    ----------
    spec : Spec
        Whose conversions it runs.
    count : int
        How many in a batch.
    """

    def __init__(self, spec: specs.Spec, count: int) -> None:
        options = {name: True for name in ("huge_pages", "prefault") if getattr(spec.guest, name)}
        plan = spec.plan(0)
        vm = gmemcore.create_vm(
            plan.vm_type, plan.abi, firmware=plan.firmware, backing=spec.guest.backing, **options
        )
        self.gmem = vm.create_guest_memfd(spec.memory, 1)
        vm.add_memslot(0, 0, spec.memory, self.gmem)
        vm.launch_finish()
        made = conversions(spec, count * (SAMPLES + 1))
        columns = [np.ascontiguousarray(made[name]) for name in ("gpa", "size", "attributes", "flags")]
        self.bytes_each = float(columns[1].mean())
        self.batches = [[column[at : at + count] for column in columns] for at in range(0, len(made), count)]
        self.rate(self.batches.pop())  # warms up

    def rate(self, batch: list) -> float:
        """Conversions a second."""
        began = time.perf_counter()
        result = self.gmem.set_memory_attributes_many(*batch)
        seconds = time.perf_counter() - began
        assert not result.errno.any()
        return len(batch[0]) / seconds

    def rates(self) -> list[float]:
        """Of each batch."""
        return [self.rate(batch) for batch in self.batches]


def fresh_rates(spec: specs.Spec, guests: int = 50) -> list[float]:
    """Conversions a second of bare batches as large as a guest's run, each on a guest of its own."""
    plan, rates = spec.plan(0), []
    made = conversions(spec, spec.operations)
    columns = [np.ascontiguousarray(made[name]) for name in ("gpa", "size", "attributes", "flags")]
    for _ in range(guests):
        vm = gmemcore.create_vm(plan.vm_type, plan.abi, firmware=plan.firmware, backing=spec.guest.backing)
        gmem = vm.create_guest_memfd(spec.memory, 1)
        began = time.perf_counter()
        gmem.set_memory_attributes_many(*columns)
        rates.append(len(made) / (time.perf_counter() - began))
        vm.close()
    return rates


def processes() -> list[Path]:
    """Folders of /proc of this process and of all that it started."""
    found, waiting = [], [os.getpid()]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        with suppress(OSError):
            waiting += [
                int(child) for task in folder.glob("task/*/children") for child in task.read_text().split()
            ]
            found.append(folder)
    return found


def peak_memory() -> int:
    """Most bytes that each of the processes has held, together."""
    total = 0
    for folder in processes():
        with suppress(OSError):
            lines = (folder / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    return total


def cpu_seconds() -> float:
    """Processor time that the processes have had."""
    ticks = 0
    for folder in processes():
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Watch:
    """Takes the time from the first results on, and the memory."""

    def __init__(self, warm: int) -> None:
        self.warm, self.began, self.memory = warm, False, 0
        self.operations = self.seconds = self.cpu_seconds = 0.0

    def __call__(self, state: Run) -> None:
        """See how far it has come."""
        done = state.merger.all
        ended = done.guests == state.merger.total
        if not self.began and done.guests >= self.warm:
            self.began = True
            self.before = (done.operations, time.perf_counter(), cpu_seconds())
        if ended:
            now = (done.operations, time.perf_counter(), cpu_seconds())
            self.operations, self.seconds, self.cpu_seconds = (
                after - before for after, before in zip(now, self.before, strict=True)
            )
        if ended or done.guests % 50 == 0:
            self.memory = max(self.memory, peak_memory())

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds


def verdict(name: str, figure: float, bar: float, met: bool) -> bool:
    """Print a figure and its bar."""
    print(
        f"  {name}: {format_number(figure)}; bar {format_number(bar)}: {'met' if met else 'MISSED'}",
        flush=True,
    )
    return met


def checked(done: Run) -> None:
    """A run counts only if it is whole and nothing was found."""
    assert done.violation is None, done.violation
    assert done.merger.complete


def attributes() -> bool:
    """1,000 guests of 64 GiB."""
    spec = fleet(1000, 10_000, {"memory": "64g"})
    rates, fresh = Bare(spec, 200_000).rates(), fresh_rates(spec)
    watch = Watch(warm=2 * WORKERS)
    done = run(spec, runner=Processes(WORKERS), workers=WORKERS, watch=watch)
    checked(done)
    rates += Bare(spec, 200_000).rates()
    fresh += fresh_rates(spec)
    rate, on_fresh = float(np.median(rates)), float(np.median(fresh))
    print(
        f"attributes: {spec.total} guests of 64g, {done.merger.all.operations} operations, {WORKERS} workers"
    )
    print(f"  {watch.rate / 1e6:.2f}M operations/s, bare batch on one thread {rate / 1e6:.2f}M/s")
    cpus = watch.cpu_seconds / watch.seconds
    print(f"  {watch.rate / cpus / 1e6:.2f}M operations per CPU second, on {cpus:.1f} CPUs")
    share = watch.rate / on_fresh
    print(
        f"  bare batches of 10,000, each on a new guest: {on_fresh / 1e6:.2f}M/s; fleet / those: {share:.2f}"
    )
    print(f"  digest {done.merger.all.digest}")
    met = verdict("fleet / bare batch", watch.rate / rate, 0.6, watch.rate >= 0.6 * rate)
    return met & memory_met(watch.memory)


def memory_met(memory: int) -> bool:
    return verdict("GiB of memory", memory / (1 << 30), MOST_MEMORY / (1 << 30), memory <= MOST_MEMORY)


def deferred() -> bool:
    """1,000 guests of 64 GiB with contents, next to 1,000 without."""
    guest = {"memory": "64g", "abis": ["two-caps"], "firmware": ["cipher"]}
    rates: dict[str, list[float]] = {"none": [], "anonymous": []}
    memory = 0
    for backing in ("none", "anonymous") * 3:
        spec = fleet(1000, 10_000, {**guest, "backing": backing}, private_flags=2, share_flags=2)
        watch = Watch(warm=2 * WORKERS)
        done = run(spec, runner=Processes(WORKERS), workers=WORKERS, watch=watch)
        checked(done)
        rates[backing].append(watch.rate)
        memory = max(memory, watch.memory)
    met = done.merger.all.checks["promise_met"]
    print(f"deferred: {spec.total} guests of 64g, {done.merger.all.operations} operations, {met} promises")
    without, with_contents = (float(np.median(rates[backing])) for backing in ("none", "anonymous"))
    print(f"  {with_contents / 1e6:.2f}M operations/s with contents, {without / 1e6:.2f}M/s without")
    share = with_contents / without
    return verdict("with / without contents", share, 0.5, share >= 0.5 and met > 0) & memory_met(memory)


def driver_seconds(spec: specs.Spec, workers: int) -> tuple[float, float]:
    """Operations a second of a fleet, and processor time of the driver alone."""
    watch, began = Watch(warm=2 * workers), time.process_time()
    checked(run(spec, runner=Processes(workers), workers=workers, watch=watch))
    return watch.rate, time.process_time() - began


def dask_seconds(task: bytes, answer_size: int, tasks: int = 1000) -> float:
    """Processor time of Dask's client and scheduler for a task that does nothing, on two workers."""
    from distributed import Client, LocalCluster

    options = {"n_workers": WORKERS, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(host="127.0.0.1", **options) as cluster, Client(cluster) as client:
        for count in (50, tasks):  # the first ones warm up
            began = time.process_time()
            client.gather([client.submit(_no_chunk, task, answer_size, i) for i in range(count)])
        return (time.process_time() - began) / tasks


def _no_chunk(task: bytes, answer_size: int, number: int) -> bytes:
    return bytes(answer_size)


def scaling() -> bool:
    """What is outside of guests: processor time of the driver per chunk and guest, bytes of a result."""
    spec = fleet(400, 10_000, {"memory": "64g"})
    by_workers = {workers: driver_seconds(spec, workers)[0] for workers in (1, 2)}
    guests, per_guest = 2000, {}
    for each in (1, 50):  # guests of one operation, in chunks of one and of 50
        tiny = specs.check(
            {
                **{"guests": guests, "operations": 1, "behaviour": [{"name": "scatter"}]},
                **{"guest": {"memory": "4m"}, "checks": CHECKS, "chunks": {"guests": each}},
            }
        )
        per_guest[each] = driver_seconds(tiny, WORKERS)[1] / guests
    chunk = (per_guest[1] - per_guest[50]) / (1 - 1 / 50)
    guest = per_guest[1] - chunk
    text = spec.encode()
    answer = run_chunk(text, range(8), code_id())
    rate, seconds = by_workers[1], spec.chunks.seconds
    in_chunk = rate / spec.operations * seconds
    per_task = dask_seconds(text, len(answer) // 8 * round(in_chunk))
    print(f"scaling: guests of 64g, {spec.operations} operations each")
    for workers, found in by_workers.items():
        print(f"  {workers} workers: {found / 1e6:.2f}M operations/s")
    print(f"  the driver's processor time: {chunk * 1e6:.0f} µs per chunk, {guest * 1e6:.0f} µs per guest")
    print(
        f"  a task: {len(text)} bytes and a number per guest; a result: {len(answer) / 8:.0f} bytes per guest"
    )
    print(f"  with Dask, {per_task * 1e6:.0f} µs more per chunk, in its client and scheduler")
    print(f"  a chunk takes {seconds} s, {in_chunk:.0f} of these guests; expected, in M operations/s:")
    counts = (1, 10, 100, 1000)
    print("  operations  chunks over  1 driver feeds" + "".join(f"{count:>9}" for count in counts))
    for operations in (10_000, 100_000, 1_000_000):
        for link, more in (("pipes", 0), ("Dask", per_task)):
            busy = guest * rate / operations + (chunk + more) / seconds  # of the driver, per worker
            shown = "".join(f"{min(count, 1 / busy) * rate / 1e6:9.0f}" for count in counts)
            print(f"  {operations:10}  {link:11}  {1 / busy:6.0f} workers{shown}")
    return True


def terabytes() -> bool:
    """One guest of 16 TiB."""
    spec = fleet(1, 10_000, {"memory": "16t"})
    began, watch = time.perf_counter(), Watch(warm=0)
    done = run(spec, watch=watch)
    checked(done)
    print(f"terabytes: a guest of 16t, {done.merger.all.operations} operations")
    print(f"  {time.perf_counter() - began:.2f} s, digest {done.merger.all.digest}")
    return memory_met(watch.memory)


def contents() -> bool:
    """4 guests of 2 GiB with contents."""
    guest = {
        "memory": "2g",
        "backing": "anonymous",
        "huge_pages": True,
        "prefault": True,
        "abis": ["two-caps"],
        "firmware": ["cipher"],
    }
    spec = fleet(4, 50_000, guest, run="2m", private_flags=2, share_flags=2)
    bare = Bare(spec, 5_000)
    rates, bytes_each = bare.rates(), bare.bytes_each
    del bare
    began = time.perf_counter()
    run(fleet(1, 1, guest))  # faults in the memory that guests are given one after the other
    print(f"contents: faulting in {format_size(spec.memory)} took {time.perf_counter() - began:.1f} s")
    watch = Watch(warm=0)
    done = run(spec, watch=watch)
    checked(done)
    rates += Bare(spec, 5_000).rates()
    rate = float(np.median(rates))
    moved = done.merger.all.counters["bytes_xored"] / watch.seconds / 1e9
    print(f"contents: 4 guests of {format_size(spec.memory)}, {done.merger.all.operations} operations")
    print(f"  {watch.rate * bytes_each / 1e9:.1f} GB/s of requests, {moved:.1f} GB/s XORed")
    print(f"  bare batch {rate * bytes_each / 1e9:.1f} GB/s of requests; digest {done.merger.all.digest}")
    return verdict("fleet / bare batch", watch.rate / rate, 0.7, watch.rate >= 0.7 * rate)


def kills() -> bool:
    """50 kills of a driver, and 50 of drivers and workers."""
    tests = ["tests/stress/test_stress_log.py", "tests/stress/test_stress_processes.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "-k", "fifty", *tests]
    began = time.perf_counter()
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent, check=False)
    print(f"kills: {time.perf_counter() - began:.0f} s")
    return verdict("kills survived", 100 if ended.returncode == 0 else 0, 50, ended.returncode == 0)


BARS = {
    "attributes": attributes,
    "deferred": deferred,
    "scaling": scaling,
    "terabytes": terabytes,
    "contents": contents,
    "kills": kills,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bars", nargs="*", metavar="BAR", help=", ".join(BARS))
    asked = parser.parse_args().bars or list(BARS)
    if unknown := set(asked) - set(BARS):
        parser.error(f"unknown bar {', '.join(sorted(unknown))}; known: {', '.join(BARS)}")
    gmemcore.warmup()
    keep_freed_memory()
    # A bar that is missed gets one more look: a busy machine is no verdict.
    verdicts = [BARS[name]() or (name != "kills" and BARS[name]()) for name in asked]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
