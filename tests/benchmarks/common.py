"""What the benchmark scripts share: options, timing, tables, processes."""

import argparse
import concurrent.futures
import multiprocessing
import re
import socket
import time
from pathlib import Path

import numpy as np

import utils


def options(description):
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def seconds(function, *arguments):
    """Seconds that one call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def by_turns(functions, rounds):
    """Seconds of calls that take turns: `(rounds, len(functions))`.

    What disturbs the machine meets all of them alike, so that ratios hold.
    """
    return np.array(
        [[seconds(function) for function in functions] for _ in range(rounds)]
    )


def print_table(title, rows, columns):
    """Print dicts as a table; `columns` maps a heading to key and format."""
    cells = [list(columns)]
    for row in rows:
        cells.append(
            [_cell(row.get(key), form) for key, form in columns.values()]
        )
    print(f"\n{title}\n{utils.align(cells)}", flush=True)


def _cell(value, form):
    if value is None:
        return "-"
    return form(value) if callable(form) else format(value, form)


def run_cases(description, cases, columns, argv=None):
    """All of a script that measures cases: options, tables, JSON.

    Args:
        cases: {name: (key of its rows in the JSON, function that measures)};
            `smoke` is left out by default.
        columns: {key: see `print_table`}.

    Returns: {key: rows}.
    """
    parser = options(description)
    usual = [name for name in cases if name != "smoke"]
    parser.add_argument("--cases", nargs="+", choices=cases, default=usual)
    given = parser.parse_args(argv)
    results = {"cases": []}
    for name in given.cases:
        key, measure = cases[name]
        rows = measure()
        results.setdefault(key, []).extend(rows)
        print_table(name, rows, columns[key])
    write(given, results)
    return results


def write(given, results):
    """Write results, or a list of cases, to the file of `--json`."""
    if given.json:
        cases = results if isinstance(results, dict) else {"cases": results}
        utils.write_json(given.json, cases)


def exponent(sizes, times):
    """Slope b of the line `log time = a + b log size`."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def in_process(function, *arguments):
    """What a function returns in a new process, whose memory is its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def free_hosts(count):
    """Addresses on loopback that nothing listens at."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    hosts = [f"localhost:{opened.getsockname()[1]}" for opened in sockets]
    for opened in sockets:
        opened.close()
    return hosts


def memory_mb(field):
    """`VmHWM`, the most memory held, or `VmRSS`, that held now; in MB.

    Not `getrusage`: its peak is inherited from the process that started this.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024
