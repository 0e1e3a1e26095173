"""Fixtures shared by all tests: shared data, real ranks, tiny models."""

import os

# Tests fork ranks and run on the CPU; PyTorch must not find a GPU before that is said.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Hundreds of processes import the same files: the first of them may keep what it has compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from support import costs, job_setup, tiny, tools  # noqa: E402
from support.launcher import ROOT, Ranks  # noqa: E402

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# How fast examples are drawn and tried says what else the machine does.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("any machine", CALM)
settings.load_profile("any machine")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark slow tests, and begin with the longest files."""
    for item in items:
        if costs.is_slow(item.nodeid, set(getattr(item, "fixturenames", ()))):
            item.add_marker("slow")
    items.sort(key=lambda item: costs.place(item.nodeid))
    if config.args == config.getini("testpaths"):
        lost = costs.unknown([item.nodeid for item in items])
        if lost:
            raise pytest.UsageError(f"tests/support/costs.py lists what is no test: {lost}")


def pytest_terminal_summary(terminalreporter):
    """Say which tests should be listed as slow."""
    for report in terminalreporter.getreports("passed"):
        if report.when == "call" and report.duration > costs.LIMIT:
            if "slow" not in report.keywords:
                line = f"{report.nodeid} took {report.duration:.1f} s and is not listed as slow"
                terminalreporter.write_line(line, yellow=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real preference pairs and tokenizers; see INFIFPO_TEST_DATA in tests/README.md."""
    path = Path(os.environ.get("INFIFPO_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data in {path}: set INFIFPO_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Real gloo ranks, forked from one process that has imported everything."""
    launcher = Ranks(tmp_path_factory.mktemp("ranks"))
    launcher(1, "os:getpid")  # wait until it has imported everything
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def setup(tmp_path_factory, ranks) -> job_setup.Setup:
    """A tiny pivot, two sources, and preference data scored under all three."""
    return job_setup.make(tmp_path_factory.mktemp("job"), ranks)


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory) -> Path:
    """A tiny Qwen2: tensors of every kind."""
    return tiny.save_model(tmp_path_factory.mktemp("qwen2") / "hf", "qwen2")


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a tool as its command line does; return (exit code, stdout, stderr)."""

    def call(name, *args):
        with pytest.raises(SystemExit) as caught:
            tools.command(f"tools/{name}.py", [str(word) for word in args])
        return (caught.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma-3-270M, for those who accept its terms: INFIFPO_GEMMA names a Hugging Face folder."""
    folder = os.environ.get("INFIFPO_GEMMA")
    if folder is None:
        pytest.skip("Gemma's terms are the user's to accept: set INFIFPO_GEMMA to its folder")
    return Path(folder)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as the demo's pivot; INFIFPO_SMOLLM2 names a folder to keep it in."""
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    import pivot

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers: one makes it
    folder = os.environ.get("INFIFPO_SMOLLM2") or base / "smollm2"
    try:
        with FileLock(f"{folder}.lock"):
            return pivot.save_pivot(folder)
    except ValueError as error:
        pytest.skip(str(error))
