"""`pytest --slow` also runs the long versions."""
import signal
import pytest

if signal.getsignal(signal.SIGINT)==signal.SIG_IGN:   # as in what a shell starts with `&`: the tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

def pytest_addoption(parser): parser.addoption('--slow', action='store_true', help='run the long versions too')

def pytest_collection_modifyitems(config, items):
    if config.getoption('--slow'): return
    long = [i for i in items if i.get_closest_marker('slow')]
    items[:] = [i for i in items if i not in long]
    config.hook.pytest_deselected(items=long)

@pytest.fixture
def slow(request):
    "Is this the long version?"
    return request.config.getoption('--slow')
