"""Fixtures that several tests share, and --assets DIR:
real tokenizers and weights (smollm2-135m, llama3-tokenizer)."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoints import CONFIGS, random_llama, write_checkpoint  # noqa: E402

from evals import heldout  # noqa: E402
from tiny import world  # noqa: E402

# The models here are tiny: threads would only wait for each other,
# in this process and in those it starts.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "beside(*command): starts with the session and runs "
                            "beside the other tests; the test comes last and takes its result")


def pytest_collection_modifyitems(items):
    """Tests that wait for a program of their own come last. The order is otherwise kept."""
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)


@pytest.fixture(scope="session", autouse=True)
def programs(request):
    """{test: future of its finished program}; one after another, on a core of their own."""
    def start(command):
        life = subprocess.Popen([sys.executable, *command], text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)
        lives.append(life)
        stdout, stderr = life.communicate()
        return subprocess.CompletedProcess(command, life.returncode, stdout, stderr)

    lives, queue = [], ThreadPoolExecutor(1)
    marks = {item.nodeid: item.get_closest_marker("beside") for item in request.session.items}
    yield {test: queue.submit(start, mark.args) for test, mark in marks.items() if mark}
    queue.shutdown(wait=False, cancel_futures=True)
    for life in lives:
        life.kill()


@pytest.fixture
def finished(programs, request):
    """The finished program of a test that is marked as beside: returncode, stdout, stderr."""
    return programs[request.node.nodeid].result()


def pytest_addoption(parser):
    parser.addoption("--assets", type=Path, help="folder with smollm2-135m/ and llama3-tokenizer/")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With --assets a skip is a failure: whoever gives the assets wants every test to run."""
    report = yield
    if report.skipped and item.config.getoption("--assets"):
        report.outcome, report.longrepr = (
            "failed", f"skipped, although --assets was given: {report.longrepr}")
    return report


@pytest.fixture
def assets(request):
    folder = request.config.getoption("--assets")
    if folder is None:
        pytest.skip("needs real tokenizers and weights: pytest --assets DIR")
    return folder


@pytest.fixture
def few_held_out(monkeypatch):
    """Evaluations of the embedded worlds take a twentieth of their tasks."""
    monkeypatch.setattr(heldout, "ASKED", 50)
    for name in ("held_out_queries", "held_out_tasks"):
        some = getattr(world, name)()[::20]
        monkeypatch.setattr(world, name, lambda some=some: list(some))


@pytest.fixture
def llama():
    """A random Llama in float64, 37 tokens of vocabulary:
    differences above 1e-9 are bugs, not rounding."""
    return random_llama("llama3_tied", dtype=torch.float64)


@pytest.fixture(params=sorted(CONFIGS))
def checkpoint_dir(request, tmp_path):
    """A directory with a random checkpoint of each kind; its .name is the kind."""
    write_checkpoint(tmp_path / request.param, request.param)
    return tmp_path / request.param
