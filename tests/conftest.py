"""Fixtures of several test files."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from vraxion_ckpt.cli import main


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="try every single-bit flip, not a sample of them")


@pytest.hookimpl(tryfirst=True)  # before cases are deselected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is marked ``one_in(n)``, leave every n-th case to the fast tests, and mark the others as slow."""
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("one_in")
        if marker:
            test = item.nodeid.partition("[")[0]
            if seen[test] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[int, str], None]:
    """Report a count, by the number of the promise that it is for; printed at the end of the run."""
    return lambda number, text: record_property("figure", (number, text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    found = [value for report in reports for name, value in report.user_properties if name == "figure"]
    if found:
        terminalreporter.section("reliability", sep="-")
    for number, text in sorted(found):
        terminalreporter.write_line(f"{number:>3}  {text}")


def pytest_configure(config: pytest.Config) -> None:
    # A run that fails must fail again; the long one looks further.
    settings.register_profile("ours", derandomize=not config.getoption("--exhaustive"), database=None)
    settings.load_profile("ours")


@pytest.fixture
def exhaustive(request: pytest.FixtureRequest) -> bool:
    """Whether to try everything where a sample is the rule."""
    return bool(request.config.getoption("--exhaustive"))


@pytest.fixture
def no_reader_waits_for_ever() -> Iterator[None]:
    """A FIFO that is opened blocks; after this long the test fails instead."""

    def stop(*_: object) -> None:
        raise AssertionError("still reading")  # which no reader takes for an error of the file

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def signal_handlers_are_kept() -> Iterator[None]:
    """Restore the handlers after each test: a process that a later test starts would inherit an ignored signal."""
    before = {number: signal.getsignal(number) for number in _ENDING}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; return its exit code and what it wrote to stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        before = {number: signal.getsignal(number) for number in _ENDING}
        try:
            with pytest.raises(SystemExit) as stop:
                main(list(map(str, arguments)))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        told = capsys.readouterr()
        return int(stop.value.code or 0), told.out, told.err

    return run


@pytest.fixture
def cli(run_cli: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process; return its exit code and what it wrote to stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        code, _, said = run_cli(*arguments)
        return code, said

    return run
