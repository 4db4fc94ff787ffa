"""Runs tests of upstream bitsandbytes against this package and compares every outcome with a committed list.

Usage: upstream_tests.py UPSTREAM [--files FILE...] [--site DIR] [--expected CSV] [-- PYTEST_ARG...]

UPSTREAM is a checkout of bitsandbytes-foundation/bitsandbytes; only its tests/ is read, by copying it into an empty
folder, so that nothing but the installed package can be imported under the name bitsandbytes.  Before the first test
the package must prove to be ours: its place, its version, and its native library.  Tests marked slow, benchmark or
deprecated are not run.  pytest runs in this process: the package that was checked is the one that is tested.

Upstream's tests run on the device that BNB_TEST_DEVICE names, on the CPU if it names none.  The list,
tests/upstream/expected.csv, or expected-cuda.csv on CUDA, has the columns id, outcome and reason.  In an id, relative
to tests/, a star stands for any text and every other character for itself; a file that cannot be imported is the one
test FILE::(collection).  The outcome is failed, skipped, error, xfailed or xpassed; a test that no row names must pass.
The list cannot rot: it is a difference, too, if a test does not have the outcome of its row, if two rows name one
test, and if a row of a file that was run names no test (not judged when PYTEST_ARGs, which may select, are given).

Exit status: 0 no difference, 1 differences, 2 the run could not start: wrong argument, wrong package, broken list.
"""

import argparse
import csv
import os
import re
import shutil
import sys
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build/upstream-tests"
OUTCOMES = ("failed", "skipped", "error", "xfailed", "xpassed")
MARKS = ("slow", "benchmark", "deprecated")
DEVICE = os.environ.setdefault("BNB_TEST_DEVICE", "cpu")  # upstream's name: its tests read it
EXPECTED = ROOT / f"tests/upstream/expected{'' if DEVICE == 'cpu' else '-' + DEVICE}.csv"


class Row(NamedTuple):
    """One line of the list."""

    line: int
    id: str
    outcome: str
    reason: str

    @property
    def file(self):
        return self.id.split("::")[0]

    def names(self, test):
        """Is `test`, an id, one of this row's?"""
        return re.fullmatch(".*".join(map(re.escape, self.id.split("*"))), test, re.DOTALL) is not None


class Result(NamedTuple):
    """What one test did; `detail` is the last line of a failure, or why the test was skipped."""

    outcome: str
    detail: str = ""


def read_list(path):
    """[Row] of the committed list. ValueError, with the line, for a row that says too little."""
    with path.open(newline="") as file:
        reader = csv.reader(file)
        if next(reader, None) != ["id", "outcome", "reason"]:
            raise ValueError(f"{path.name}:1: expected the header id,outcome,reason")
        rows = []
        for cells in reader:
            where = f"{path.name}:{reader.line_num}"
            if len(cells) != 3 or not all(cell.strip() for cell in cells):
                raise ValueError(f"{where}: {len(cells)} cells, expected id, outcome and reason, none empty")
            row = Row(reader.line_num, *cells)
            if row.outcome not in OUTCOMES:
                raise ValueError(f"{where}: outcome is {row.outcome!r}, expected one of {', '.join(OUTCOMES)}")
            if "*" in row.file or "::" not in row.id:
                raise ValueError(f"{where}: id is {row.id!r}, expected FILE::TEST with no star in FILE")
            rows.append(row)
    return rows


class Recorder:
    """A pytest plugin that keeps one Result per test; the worst phase (setup, call, teardown) counts."""

    def __init__(self):
        self.results = {}

    def _keep(self, nodeid, outcome, detail=""):
        test = nodeid.removeprefix("tests/")
        if outcome != "passed" or test not in self.results:
            self.results[test] = Result(outcome, detail)

    def pytest_runtest_logreport(self, report):
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        elif report.failed and report.when != "call":
            outcome = "error"
        self._keep(report.nodeid, outcome, last_line(report))

    def pytest_collectreport(self, report):
        if not report.passed:
            outcome = "skipped" if report.skipped else "error"
            self._keep(report.nodeid + "::(collection)", outcome, last_line(report))


def last_line(report):
    """The line of a report that says most."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message.splitlines()[0] if crash and crash.message else str(report.longrepr or "").rpartition("\n")[2]
    return text.strip()[:160]


def check_package(site):
    """Import bitsandbytes and return a line about it. RuntimeError unless it is this project's, installed in `site`."""
    import bitsandbytes
    from bitsandbytes import cextension

    place = Path(bitsandbytes.__file__).resolve().parent.parent
    if place != site.resolve():
        raise RuntimeError(f"bitsandbytes was imported from {place}, expected {site}")
    version = re.search(r'#define BNB_VERSION "(.+)"', (ROOT / "include/bitsandbytes.h").read_text()).group(1)
    if getattr(cextension, "load_error", "") is not None:
        raise RuntimeError(f"no native library: {getattr(cextension, 'load_error', 'this is another bitsandbytes')}")
    found = {"package": bitsandbytes.__version__, "native library": cextension.library_version()}
    for what, number in found.items():
        if number != version:
            raise RuntimeError(f"the {what} has version {number}, expected {version}")
    return f"bitsandbytes {version}, {cextension.library_path.name} loaded"


def copy_tests(upstream, files):
    """Fill FOLDER, emptied first, with upstream's tests/ and a configuration of pytest's."""
    source = upstream / "tests"
    missing = [name for name in ("conftest.py", *files) if not (source / name).is_file()]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} missing in {source}, expected a checkout of upstream")
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(source, FOLDER / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    marks = "".join(f"    {mark}: deselected here\n" for mark in MARKS)
    (FOLDER / "pytest.ini").write_text(f"[pytest]\nmarkers =\n{marks}")


def run_pytest(files, arguments):
    """{id: Result} of the tests in `files`; RuntimeError if pytest itself failed."""
    import pytest

    os.chdir(FOLDER)
    recorder = Recorder()
    deselect = " and ".join(f"not {mark}" for mark in MARKS)
    options = ["-c", "pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider", "-q", "--tb=short", "-m", deselect]
    options += ["--junit-xml", "results.xml", "--continue-on-collection-errors", *arguments]
    options += [f"tests/{name}" for name in files]
    status = pytest.main(options, plugins=[recorder])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended early, with status {int(status)}")
    return recorder.results


def compare(results, rows):
    """(file -> Counter of passed, listed and unexpected, the differences as lines, the rows that named a test)."""
    table, differences, used = defaultdict(Counter), [], set()
    for test, (outcome, detail) in results.items():
        named = [row for row in rows if row.names(test)]
        used.update(named)
        expected = {row.outcome for row in named} or {"passed"}
        column = "unexpected"
        if len(named) > 1:
            differences.append(f"{test}: named by lines {' and '.join(str(row.line) for row in named)} of the list")
        elif outcome not in expected:
            wanted = f"listed as {named[0].outcome}: {named[0].reason}" if named else "not listed"
            differences.append(f"{test}: {outcome} ({wanted}){' - ' + detail if detail else ''}")
        else:
            column = "as listed" if named else "passed"
        table[test.split("::")[0]][column] += 1
    return table, differences, used


def print_table(table):
    columns = ("passed", "as listed", "unexpected")
    width = max(map(len, ("total", *table)))
    print("\n" + " ".join([f"{'file':{width}}", *(f"{column:>10}" for column in columns)]))
    for file, counts in [*sorted(table.items()), ("total", sum(table.values(), Counter()))]:
        print(" ".join([f"{file:{width}}", *(f"{counts[column]:>10}" for column in columns)]))


def arguments_of(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("upstream", type=Path, help="a checkout of upstream")
    parser.add_argument("--files", nargs="+", default=["test_optim.py"], metavar="FILE", help="files of its tests/")
    parser.add_argument("--site", type=Path, default=sysconfig.get_path("purelib"), help="where our package must lie")
    parser.add_argument("--expected", type=Path, default=EXPECTED, help="the list")
    at = argv.index("--") if "--" in argv else len(argv)
    arguments = parser.parse_args(argv[:at])
    arguments.pytest = argv[at + 1 :]
    return arguments


def main(argv):
    arguments = arguments_of(argv)
    try:
        rows = [row for row in read_list(arguments.expected) if row.file in arguments.files]
        package = check_package(arguments.site)
        copy_tests(arguments.upstream, arguments.files)
        print(package, flush=True)
        results = run_pytest(arguments.files, arguments.pytest)
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        print(f"upstream-tests: {error}", file=sys.stderr)
        return 2
    table, differences, used = compare(results, rows)
    if arguments.pytest:
        print("rows that name no test are not judged: pytest was given arguments")
    else:
        differences += [f"{row.id}: line {row.line} of the list names no test" for row in rows if row not in used]
    if not results:
        differences.append("no test ran")
    print("".join(f"\nunexpected: {line}" for line in differences))
    print_table(table)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # no test shall import a file of tools/
    sys.exit(main(sys.argv[1:]))
