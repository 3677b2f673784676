"""Scripts with managers of their own: what workers find of the main module, and where they look."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.process_pools import run_program

each_method = pytest.mark.parametrize("method", ["forkserver", "spawn"])

# As in the documentation, but for the start method and what is printed.
STANDALONE = """
import asyncio
import os
import sys

from leasepool_django import ExecutorBackend, LeasedExecutorManager


def count_primes(limit):
    found = 0
    for number in range(2, limit):
        for divisor in range(2, int(number**0.5) + 1):
            if number % divisor == 0:
                break
        else:
            found += 1
    return found, os.getpid()


async def main():
    manager = LeasedExecutorManager(
        backend=ExecutorBackend.PROCESS, max_pools=1, min_pools=1, workers_per_pool=2,
        mp_context=sys.argv[1],
    )
    await manager.start()
    try:
        async with await manager.acquire(owner="cpu-primes") as lease:
            results = await asyncio.gather(
                *(lease.run(count_primes, n) for n in (20_000, 21_000, 22_000, 23_000))
            )
    finally:
        await manager.stop()
    print([primes for primes, _ in results])
    assert os.getpid() not in {pid for _, pid in results}


if __name__ == "__main__":
    asyncio.run(main())
"""


@each_method
def test_a_script_may_hold_its_functions_itself(method: str, tmp_path: Path) -> None:
    program = run_program(tmp_path, STANDALONE, method)
    assert program.stderr == ""
    assert program.stdout == "[2262, 2360, 2464, 2564]\n"
    assert program.returncode == 0


UNGUARDED = STANDALONE.replace('if __name__ == "__main__":\n    ', "")


@each_method
def test_an_unguarded_script_is_told_what_is_missing(method: str, tmp_path: Path) -> None:
    program = run_program(tmp_path, UNGUARDED, method)
    assert program.returncode == 1
    assert program.stdout == ""
    assert "leasepool_django.exceptions.WorkerStartError" in program.stderr
    assert "A manager cannot be started inside a worker." in program.stderr
    assert "`if __name__ == '__main__':`" in program.stderr


OWN_CLASSES = """
import sys
from leasepool_django import LeasedExecutorManager

configured = None


class Order:
    def __init__(self, number):
        self.number = number

    def total(self, factor):
        return self.number * factor


class OrderError(Exception):
    pass


def configure(value):
    global configured
    configured = value


def double(order):
    assert configured == "eu"
    return Order(order.number * 2)


def fail(order):
    raise OrderError(order.number)


if __name__ == "__main__":
    manager = LeasedExecutorManager(
        max_pools=1, workers_per_pool=1, mp_context=sys.argv[1],
        initializer=configure, initargs=["eu"],
    )
    manager.start_sync()
    order = manager.run_sync(double, Order(3))
    print(type(order) is Order, order.number, manager.run_sync(Order(3).total, 5))
    try:
        manager.run_sync(fail, order)
    except OrderError as error:
        print(error.args)
    manager.stop_sync()
"""


@each_method
def test_classes_of_the_main_module_travel_both_ways(method: str, tmp_path: Path) -> None:
    program = run_program(tmp_path, OWN_CLASSES, method)
    assert (program.stdout, program.stderr) == ("True 6 15\n(6,)\n", "")


SIBLING = """
import os, sys
from leasepool_django import LeasedExecutorManager
import sibling

if __name__ == "__main__":
    os.chdir("/")
    sys.path.insert(0, sys.argv[2])
    import inserted
    manager = LeasedExecutorManager(
        max_pools=1, workers_per_pool=1, mp_context=sys.argv[1],
        preload=["inserted"], initializer="sibling.initialize",
    )
    manager.start_sync()
    print(manager.run_sync(sibling.work), manager.run_sync(inserted.work))
    manager.stop_sync()
"""


@each_method
def test_workers_find_what_this_process_finds(method: str, tmp_path: Path) -> None:
    """From any working directory, and also on a path that was added while the program ran."""
    (tmp_path / "sibling.py").write_text(
        "import sys\ndef initialize(): sys.initialized = True\n"
        "def work(): return sys.argv[1:], sys.initialized\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "inserted.py").write_text("def work(): return __file__\n")
    program = run_program(tmp_path, SIBLING, method, elsewhere, cwd="/tmp")
    assert program.stderr == ""
    expected = ([method, str(elsewhere)], True), str(elsewhere / "inserted.py")
    assert program.stdout == f"{expected[0]} {expected[1]}\n"


MODULE = """
from leasepool_django import LeasedExecutorManager


def work():
    return __name__


if __name__ == "__main__":
    manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1)
    manager.start_sync()
    try:
        print(manager.run_sync(work))
    finally:
        manager.stop_sync()
"""


def test_a_module_run_by_its_name_may_hold_its_functions_itself(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "module.py").write_text(MODULE)
    program = run_program(tmp_path, "", interpreter=["-m", "package.module"])
    assert (program.stdout, program.stderr) == ("__mp_main__\n", "")


@pytest.mark.parametrize("how", ["-c", "package", "directory", "zip"])
def test_functions_that_no_worker_can_import_are_refused(how: str, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__main__.py").write_text(MODULE)
    with zipfile.ZipFile(tmp_path / "program.zip", "w") as archive:
        archive.writestr("__main__.py", MODULE)
    interpreter = {
        "-c": ["-c", MODULE],
        "package": ["-m", "package"],
        "directory": ["-X", "dev", str(package), "-c"],
        "zip": ["-X", "dev", str(tmp_path / "program.zip"), "-c"],
    }
    program = run_program(tmp_path, "", interpreter=interpreter[how])
    where = "an interactive session or in `python -c`, where a worker cannot find it"
    if how != "-c":
        where = "the `__main__` of a package, directory or zip file, which no worker can import"
    assert program.returncode == 1
    assert f"NotPicklableError: __main__.work is defined in {where}." in program.stderr
    assert "Move it to a module" in program.stderr


EARLY = """
from leasepool_django import LeasedExecutorManager


def work():
    return 1


first = LeasedExecutorManager(max_pools=1, workers_per_pool=1, initializer=work)
manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1)
try:
    manager.prepare_sync(work)
except Exception as error:
    print(type(error).__name__)
"""


def test_they_are_refused_before_the_manager_has_started(tmp_path: Path) -> None:
    """Though the name of the function is known, as that of an initializer."""
    program = run_program(tmp_path, "", interpreter=["-c", EARLY])
    assert (program.stdout, program.stderr) == ("NotPicklableError\n", "")


FLAGS = """
import os, sys
from leasepool_django import LeasedExecutorManager


def flags():
    return __debug__, sys.flags.utf8_mode, os.environ.get("FOR_WORKERS"), os.getcwd()


if __name__ == "__main__":
    os.environ["FOR_WORKERS"] = "set by the program"
    manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1, mp_context=sys.argv[1])
    manager.start_sync()
    print(manager.run_sync(flags) == flags(), *flags(), sep="\\n")
    manager.stop_sync()
"""


@each_method
def test_workers_run_as_this_process_does(method: str, tmp_path: Path) -> None:
    """With its interpreter's options, its environment and its working directory."""
    program = run_program(tmp_path, FLAGS, method, interpreter=["-O", "-X", "utf8"])
    assert program.stderr == ""
    expected = ["True", "False", "1", "set by the program", str(tmp_path)]
    assert program.stdout.splitlines() == expected


INPUT = """
from leasepool_django import LeasedExecutorManager
manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1)
manager.start_sync()
import math
print(manager.run_sync(math.factorial, 5))
manager.stop_sync()
"""


def test_a_program_without_a_file_can_use_importable_functions(tmp_path: Path) -> None:
    """And needs no guard: its workers have no main module to import."""
    program = run_program(tmp_path, "", interpreter=["-c", INPUT])
    assert (program.stdout, program.stderr) == ("120\n", "")
