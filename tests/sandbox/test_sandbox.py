"""The sandbox against programs that cheat, break out, or break things. Every case runs under every isolation that works here.
No case may pass, raise into the caller, outlive its time, or leave a process, a file or an open descriptor behind.

Processes are found by a token in their command line, so that other tests on this machine may run programs too."""
import json, os, re, secrets, subprocess, sys, tempfile, textwrap, time
from pathlib import Path
from types import SimpleNamespace
import pytest
from exp2nb.config import UserError
from exp2nb.sandbox import sandbox
from exp2nb.sandbox.program import make_program
from exp2nb.sandbox.sandbox import SandboxUnavailable, find_isolation, run_candidate, run_many, try_isolation

TOKEN = 'exp2nb-test-' + secrets.token_hex(8)
BARE = sandbox._BARE
WORKING = [n for n in ('bubblewrap', 'landlock') if not isinstance(try_isolation(n), str)]
WHY = '; '.join(f'{n}: {try_isolation(n)}' for n in sandbox._WAYS)
pytestmark = pytest.mark.skipif(not WORKING, reason=f'no isolation works on this machine: {WHY}')

PROMPT = 'def double(x):\n    """Twice x."""\n'
TEST = ('def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == -6\n'
        '    assert candidate("ab") == "abab"\n    assert candidate([1]) == [1, 1]\n')
DOUBLE = dict(task_id='test/double', prompt=PROMPT, test=TEST, entry_point='double')
HONEST = '    return x*2\n'
LINK, HUGE = (f'{tempfile.gettempdir()}/{TOKEN}-{name}' for name in ('link', 'huge'))

@pytest.fixture(params=WORKING)
def isolation(request): return request.param

@pytest.fixture(autouse=True, scope='module')
def tagged():
    "Our children carry the token: Python keeps any -X option."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sandbox, '_BARE', (*BARE[:-1], '-X', TOKEN, '-c'))
        yield

def run(problem, completion, isolation='auto', timeout=30.):
    "With so much time that a busy machine does not decide."
    return run_candidate(problem, completion, timeout, isolation=isolation)

def indented(code): return textwrap.indent(textwrap.dedent(code).strip('\n'), '    ') + '\n'
def problem(test, prompt='def f(*args):\n    """f"""\n'):
    return dict(prompt=prompt, entry_point='f', test='def check(candidate):\n' + indented(test))

def running():
    "Our candidates and judges, zombies not counted."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            if TOKEN.encode() in (p/'cmdline').read_bytes(): found.append(int(p.name))
        except OSError: pass
    return found

def wait_until(condition, seconds=60.):
    "Poll; False if it never came true."
    end = time.monotonic()+seconds
    while not condition():
        if time.monotonic() > end: return False
        time.sleep(.05)
    return True

# ---- hostile programs: name → body of the function (or a whole module, where it starts with a definition at the margin) ----

HOSTILE = {
# leave with an air of success
'sys.exit(0)': 'import sys; sys.exit(0)',
'os._exit(0)': 'import os; os._exit(0)',
'exit from the module': 'return 0\n\nimport sys\nsys.exit(0)',
'os._exit from the module': 'return 0\n\nimport os\nos._exit(0)',
'atexit': 'import atexit, os; atexit.register(os._exit, 0); raise SystemExit(0)',
'raises BaseException': 'class E(BaseException): pass\nraise E("passed")',
'raises KeyboardInterrupt': 'raise KeyboardInterrupt',
'raises GeneratorExit': 'raise GeneratorExit',
'raises StopIteration': 'raise StopIteration(4)',
'an error whose text loops': 'class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E',
'an error whose text raises': 'class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E',
'an error with a forged name': 'E = type("AssertionError", (Exception,), {}); raise E("passed")',
'an error named like no class': 'raise type("print", (Exception,), {})("passed")',
# answers that claim to be right
'equals everything': 'class E:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\nreturn E()',
'int that equals everything': 'class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\nreturn E(1)',
'str that equals everything': 'class E(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\nreturn E()',
'list that equals everything': 'class E(list):\n    def __eq__(self, other): return True\nreturn E()',
'dict that equals everything': 'class E(dict):\n    def __eq__(self, other): return True\nreturn E()',
'metaclass trick':
    'class M(type):\n    def __eq__(self, other): return True\n'
    '    def __hash__(self): return hash(int)\nclass E(metaclass=M):\n'
    '    def __eq__(self, other): return True\nreturn E()',
'hidden inside a list': 'class E:\n    def __eq__(self, other): return True\nreturn [[[E()]]]',
'float subclass': 'class E(float):\n    def __eq__(self, other): return True\nreturn E()',
'mock': 'from unittest.mock import ANY; return ANY',
'returns a function': 'return lambda: x*2',
'returns a class': 'return int',
'returns a generator': 'return (v for v in x*2)',
'returns itself': 'return double',
'returns a module': 'import os; return os',
'returns a cycle': 'a = []; a.append(a); return a',
'returns deep nesting': 'a = []\nfor _ in range(100000): a = [a]\nreturn a',
'returns too much': 'return "x"*(1<<23)',
'returns an explosion': 'a = [0]\nfor _ in range(64): a = [a, a]\nreturn a',
'returns a giant number': 'return 7**(10**6)',
'repr that loops': 'class E:\n    def __repr__(self):\n        while True: pass\nreturn E()',
'class that lies': 'class E:\n    __class__ = int\n    def __eq__(self, other): return True\nreturn E()',
'nan': 'return float("nan")',
'nested nan and inf': 'return [float("nan"), {float("inf"): float("nan")}]',
# tampering
'builtins': 'import builtins\nfor n in dir(builtins):\n    if n != "setattr": setattr(builtins, n, lambda *a, **k: True)\nreturn 1',
'AssertionError': 'import builtins; builtins.AssertionError = type("Quiet", (Exception,), {}); assert False',
'int.__eq__ by ctypes': 'import ctypes\nctypes.memset(id(int)+24, 255, 400)\nreturn 1',
'constants by ctypes': 'import ctypes\nctypes.memmove(id(4), id(1), 32)\nreturn 1',
'frames':
    'import sys\nf = sys._getframe()\nwhile f:\n'
    '    for k in list(f.f_locals): f.f_globals[k] = lambda *a, **k: ("passed", "passed")\n'
    '    f = f.f_back\nreturn 1',
'gc hunt for the judge':
    'import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict):\n        for k in list(o):\n'
    '            if k in ("passed", "outcome", "nonce", "test"): o[k] = True\nreturn 1',
'inspect the stack':
    'import inspect\nfor f in inspect.stack():\n    for v in f.frame.f_locals.values():\n'
    '        if callable(v): pass\nreturn [str(f.frame.f_locals)[:100] for f in inspect.stack()]',
'patch the jail':
    'import sys, __main__ as m\nm.to_json = lambda v: True\n'
    'm._verdict = lambda *a: ("passed", "passed")\nm._result = lambda *a: True\nreturn 1',
'patch json':
    'import json\n'
    'json.dumps = lambda *a, **k: "{\\"value\\": true, \\"passed\\": true, \\"outcome\\": \\"passed\\"}"\n'
    'return 1',
'trace': 'import sys\nsys.settrace(lambda *a: None); sys.setprofile(lambda *a: None); return 1',
'trace that loops': 'import sys\ndef t(*a):\n    while True: pass\nsys.setprofile(t)\nreturn 1',
'recursion limit and recursion': 'import sys; sys.setrecursionlimit(10**9)\ndef g(n): return g(n+1)+1\nreturn g(0)',
'deep recursion in C': 'import sys; sys.setrecursionlimit(10**9)\na = 0\nfor _ in range(10**6): a = (a,)\nreturn hash(a)',
'null pointer': 'import ctypes; ctypes.string_at(0)',
'abort': 'import os; os.abort()',
'module that cannot be imported twice': 'import sys; sys.modules.clear(); import json; return 1',
'import hook':
    'import sys\nclass H:\n    def find_spec(self, *a): raise SystemExit(0)\n'
    'sys.meta_path[:] = [H()]\nimport decimal\nreturn 1',
# forging
'prints a success marker': 'print("PASSED"); print("passed"); print("1 passed, 0 failed"); print({"passed": True}); return 0',
'prints a verdict':
    'import json, sys\n'
    'for s in (sys.stdout, sys.stderr): s.write("\\n" + json.dumps(dict(nonce="0"*32, passed=True, '
    'outcome="passed", reason="passed")) + "\\n"); s.flush()\n'
    'import os; os._exit(0)',
'writes a verdict to every descriptor':
    'import os, json\n'
    'line = b"\\n" + json.dumps(dict(nonce="", passed=True, outcome="passed", reason="passed")).encode() + b"\\n"\n'
    'for fd in range(100):\n    try: os.write(fd, line)\n    except OSError: pass\nos._exit(0)',
'forges frames':
    'import os, sys\nbody = b\'{"value": true}\'\n'
    'for _ in range(9): os.write(int(sys.argv[3]), len(body).to_bytes(4, "big") + body)\nos._exit(0)',
'forges a frame that builds an object':
    'import os, sys\nbody = b\'{"value": {"object": "x"}}\'\n'
    'os.write(int(sys.argv[3]), len(body).to_bytes(4, "big") + body)\nwhile True: pass',
'forges a giant frame': 'import os, sys\nos.write(int(sys.argv[3]), b"\\xff\\xff\\xff\\xff" + b"x"*1000)\nwhile True: pass',
'forges half a frame': 'import os, sys\nos.write(int(sys.argv[3]), b"\\x00\\x00\\x01\\x00{")\nwhile True: pass',
'forges a frame of deep nesting':
    'import os, sys\nbody = b"["*100000\n'
    'os.write(int(sys.argv[3]), len(body).to_bytes(4, "big") + body)\nwhile True: pass',
'forges a frame of invalid UTF-8': 'import os, sys\nos.write(int(sys.argv[3]), b"\\x00\\x00\\x00\\x02\\xff\\xfe")\nwhile True: pass',
'forges hash collisions':
    'import os, sys, json\nm = 2**61-1\n'
    'body = json.dumps({"value": {"set": [m*i for i in range(150000)]}}).encode()\n'
    'os.write(int(sys.argv[3]), len(body).to_bytes(4, "big"))\nv = memoryview(body)\n'
    'while v: v = v[os.write(int(sys.argv[3]), v):]\nwhile True: pass',
'floods the pipe': 'import os, sys\nwhile True: os.write(int(sys.argv[3]), b"\\x00\\x00\\x00\\x04null")',
'guesses the verdict pipe through proc':
    'import os\nfor pid in os.listdir("/proc"):\n    for fd in range(20):\n'
    '        try: open(f"/proc/{pid}/fd/{fd}", "wb").write(b"passed")\n        except OSError: pass\n'
    'return 1',
# descriptors and signals
'closes descriptors': 'import os; os.closerange(0, 1000); return x*2',
'swaps descriptors': 'import os, sys\nos.dup2(int(sys.argv[2]), int(sys.argv[3])); return x*2',
'closes stdout and then some': 'import sys, os; sys.stdout.close(); os.close(int(sys.argv[3])); return x*2',
'ignores signals':
    'import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n'
    '    except (OSError, ValueError): pass\nwhile True: pass',
'signals its parent': 'import os, signal\nos.kill(os.getppid(), signal.SIGKILL); return x*2',
'signals everybody': 'import os, signal\nos.kill(-1, signal.SIGKILL); return x*2',
'signals its group': 'import os, signal\nos.killpg(0, signal.SIGKILL); return x*2',
'alarm':
    'import signal, os\n'
    'signal.signal(signal.SIGALRM, lambda *a: os._exit(0)); signal.setitimer(signal.ITIMER_REAL, .01)\n'
    'while True: pass',
'stops itself': 'import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass',
'kills by fcntl': 'import fcntl, sys, os, signal\nfcntl.fcntl(int(sys.argv[2]), fcntl.F_SETOWN, os.getppid()); return x*2',
'raises its limits': 'import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1000, 1000)); return x*2',
# processes
'fork': 'import os\nif os.fork(): os._exit(0)\nreturn x*2',
'fork bomb': 'import os\nwhile True:\n    try: os.fork()\n    except OSError: pass',
'daemon': 'import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: time.sleep(1)\nos._exit(0)',
'subprocess': 'import subprocess; subprocess.run(["/bin/sh", "-c", "sleep 1000 &"], check=True); return x*2',
'os.system': 'import os; r = os.system("true"); assert r == 0; return x*2',
'execv': 'import os, sys; os.execv(sys.executable, [sys.executable, "-c", "pass"])',
'posix_spawn': 'import os; os.posix_spawn("/bin/true", ["true"], {}); return x*2',
'multiprocessing': 'import multiprocessing as m; p = m.Process(target=print); p.start(); p.join(); return x*2',
'threads': 'import threading\nwhile True: threading.Thread(target=lambda: None).start()',
'raw clone':
    'import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\nr = c.syscall(57)\n'
    'if r == -1: raise OSError(ctypes.get_errno(), "fork")\nreturn x*2',
'raw vfork and clone3': 'import ctypes\nc = ctypes.CDLL(None)\nassert c.syscall(58) != -1 or c.syscall(435, None, 0) != -1\nreturn x*2',
'unshare': 'import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0; return x*2',
'ptrace': 'import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0; return x*2',
'reads another process\'s memory': 'import os; open(f"/proc/{os.getppid()}/mem", "rb").read(1); return x*2',
# network
'socket': 'import socket; socket.socket(); return x*2',
'unix socket': 'import socket; socket.socket(socket.AF_UNIX); return x*2',
'socket pair': 'import socket; socket.socketpair(); return x*2',
'listens': 'import socket; s = socket.create_server(("127.0.0.1", 0)); return x*2',
'looks up a name':
    'import socket; socket.getaddrinfo("localhost", 80); import urllib.request; '
    'urllib.request.urlopen("http://127.0.0.1:9/"); return x*2',
# files
'reads /etc/passwd': 'open("/etc/passwd").read(); return x*2',
'reads /etc/hostname by descriptor': 'import os; os.read(os.open("/etc/hostname", os.O_RDONLY), 10); return x*2',
'reads the environment of others': 'open("/proc/1/environ", "rb").read(); return x*2',
'reads its own proc': 'open("/proc/self/maps").read(); return x*2',
'lists the home folder': 'import os; os.listdir("/root"); return x*2',
'lists the root': 'import os; a = os.listdir("/"); open("/" + a[0]); return x*2',
'lists tmp': 'import os; os.listdir("/tmp"); open("/tmp/x", "w"); return x*2',
'reads this test': f'open({str(Path(__file__).resolve())!r}).read(); return x*2',
'reads the package': f'open({sandbox.__file__!r}).read(); return x*2',
'reads site-packages': f'open({str(Path(pytest.__file__).resolve())!r}).read(); return x*2',
'imports the package': 'import exp2nb; return x*2',
'writes here': 'open("out.txt", "w").write("x"); return x*2',
'writes to tmp': 'import tempfile; tempfile.TemporaryFile().write(b"x"); return x*2',
'writes a huge file': f'f = open({HUGE!r}, "wb")\nwhile True: f.write(b"x"*(1<<20))',
'truncates without writing': f'import os; os.open({str(Path(__file__).resolve())!r}, os.O_RDONLY|os.O_TRUNC); return x*2',
'deletes': f'import os; os.remove({str(Path(__file__).resolve())!r}); return x*2',
'changes rights': f'import os; os.chmod({str(Path(__file__).resolve())!r}, 0o777); return x*2',
'links': f'import os; os.symlink("/etc/passwd", {LINK!r}); return x*2',
'memfd': 'import os; os.memfd_create("x"); return x*2',
'devices': 'open("/dev/mem", "rb").read(1); return x*2',
'shared memory': 'from multiprocessing import shared_memory as s; s.SharedMemory(create=True, size=1<<30); return x*2',
'chroot': 'import os; os.chroot("."); return x*2',
'mount': 'import ctypes\nassert ctypes.CDLL(None).mount(b"none", b"/", b"tmpfs", 0, None) == 0; return x*2',
# resources
'loops': 'while True: pass',
'sleeps': 'import time; time.sleep(1000)',
'memory bomb': 'a = []\nwhile True: a.append(bytearray(1<<24))',
'one big allocation': 'return len(bytearray(1<<40))',
'memory bomb by ctypes': 'import mmap\na = []\nwhile True: a.append(mmap.mmap(-1, 1<<26))',
'endless output': 'while True: print("x"*10**5)',
'endless errors': 'import sys\nwhile True: sys.stderr.write("x"*10**5)',
'endless small output': 'import os\nwhile True: os.write(1, b"x")',
'invalid UTF-8 and a wrong answer': 'import os; os.write(1, b"\\xff\\xfe\\x00\\x80"); return 0',
'a regular expression that hangs': 'import re; re.match("(a+)+$", "a"*40 + "b"); return x*2',
'a power that hangs': 'return 9**9**9',
'a loop in the module': 'return x*2\n\nwhile True: pass',
'a 200-KB program that is wrong': 'return 0\n' + '# ' + 'x'*200_000,
'200 KB of parentheses': 'return ' + '('*100_000 + ')'*100_000,
'200 KB of nesting': 'return ' + '[' *200_000,
'200 KB of operators': 'return ' + '-'*200_000 + '1',
'a constant that explodes': 'return ' + '('*20 + '"x"*10**9' + ')'*20,
'null bytes': 'return x\x00*2',
'surrogates': 'return "\ud800"',
'nothing': '',
'not Python': 'I am sorry, I cannot help with that.',
'reads input': 'return input()',
'deletes the function': 'return x*2\n\ndel double',
'replaces the function by an object': 'return x*2\n\nclass E:\n    def __eq__(self, o): return True\ndouble = E()',
'async': 'pass\n\nasync def double(x): return x*2',
}

def as_completion(body):
    "Indent the part that belongs to the function; what follows an empty line stays at the margin."
    head,*tail = body.split('\n\n', 1)
    return textwrap.indent(head, '    ') + '\n' + ('\n' + tail[0] + '\n' if tail else '')

def test_the_suite_is_large(): assert len(HOSTILE) >= 100

VERDICTS = {}
@pytest.fixture
def verdicts(isolation):
    "All hostile programs, run once for each isolation, a few at a time."
    if isolation not in VERDICTS:
        answers = [as_completion(b) for b in HOSTILE.values()]
        rows = run_many([DOUBLE]*len(HOSTILE), answers, timeout=.6, workers=3, isolation=isolation, progress=False)
        assert not running()
        VERDICTS[isolation] = dict(zip(HOSTILE, rows, strict=True))
    return VERDICTS[isolation]

@pytest.mark.timeout(900)
@pytest.mark.parametrize('name', HOSTILE)
def test_hostile(name, verdicts, isolation):
    r = verdicts[name]
    assert r['passed'] is False and r['outcome'] not in ('passed', 'not_started'), r
    assert isinstance(r['output'], str) and len(r['output']) <= 1<<16 and r['isolation'] == isolation and r['unsafe'] is False
    json.dumps(r)

def test_no_file_is_harmed_or_left():
    assert Path(__file__).stat().st_size > 10_000
    assert not Path(LINK).is_symlink() and not Path(HUGE).exists()

# ---- what must work ----

def test_honest(isolation):
    r = run(DOUBLE, HONEST, isolation)
    assert r['passed'] is True and r['output'] == '' and r['reason'] == 'passed'

VALUES = {
    '(1, [2, (3,)], {4}, {5: 6.0})': (1, [2, (3,)], {4}, {5: 6.0}), 'True': True, '1': 1, '1.0': 1.0, 'None': None, '-0.0': -0.0,
    '"é\\ud800"': 'é\ud800', 'b"\\xff"': b'\xff', '1-2j': 1-2j, 'frozenset([1])': frozenset([1]), 'set()': set(), '()': (),
    '{(1, 2): {"a": [None]}}': {(1, 2): {'a': [None]}}, 'float("inf")': float('inf'), '0.1+0.2': 0.1+0.2, '2**200': 2**200,
    '__import__("collections").Counter("aab")': {'a': 2, 'b': 1}}

@pytest.mark.parametrize('body,want', VALUES.items())
def test_types_survive(body, want, isolation):
    r = run(problem(f'got = candidate()\nassert repr(got) == {repr(want)!r}'), f'    return {body}\n', isolation)
    assert r['passed'], r

def test_arguments_survive_and_are_copies(isolation):
    args = [1, 1.5, 'x', (1,), {2}, {'k': [None, True]}, b'y', 1j]
    once = f'assert candidate(*a) == {repr(args)!r}\n'
    p = problem(f'a = {args!r}\n{once}assert a == {args!r}\n{once}')
    r = run(p, '    got = repr(list(args)); args[5]["k"].clear(); args[4].clear(); return got\n', isolation)
    assert r['passed'], r

def test_keyword_arguments(isolation):
    p = problem('assert candidate(a=1, b=(2,)) == (1, (2,))', 'def f(a, b):\n    """f"""\n')
    assert run(p, '    return a, b\n', isolation)['passed']

def test_exceptions_reach_the_tests(isolation):
    p = problem('try: candidate()\nexcept ValueError as e: assert str(e) == "no"\nelse: assert False')
    assert run(p, '    raise ValueError("no")\n', isolation)['passed']
    for body in ('raise KeyError("no")', 'return 1', 'import os; os._exit(0)', 'return lambda: 1'):
        assert not run(p, f'    {body}\n', isolation)['passed']

def test_a_test_that_catches_everything_is_not_fooled(isolation):
    p = problem('try: got = candidate()\nexcept Exception: got = 1\nassert got == 1')
    for body in ('import os; os._exit(0)', 'return object()', 'import os; os.close(int(__import__("sys").argv[3]))'):
        assert not run(p, f'    {body}\n', isolation)['passed']

def test_state_lives_from_call_to_call(isolation):
    p = problem('assert [candidate(), candidate()] == [1, 2]')
    assert run(p, '    seen.append(1); return len(seen)\n\nseen = []\n', isolation)['passed']

def test_output(isolation):
    r = run(DOUBLE, '    import os; print("naïve", x); os.write(2, b"\\xff\\xfe"); return x*2\n', isolation)
    assert r['passed'] and 'naïve [1]' in r['output'] and '\ufffd' in r['output']

def test_a_200_KB_program_that_is_right(isolation): assert run(DOUBLE, HONEST + '# ' + 'x'*200_000, isolation)['passed']

STDLIB = """re math cmath collections itertools functools operator string random heapq bisect statistics fractions decimal datetime
    calendar copy json hashlib typing dataclasses enum abc textwrap array struct zlib bz2 lzma base64 binascii time unicodedata
    contextlib queue pprint difflib numbers inspect ast keyword secrets uuid types warnings io os sys""".split()

def test_standard_library(isolation):
    body = f'''
        for m in {STDLIB!r}: __import__(m)
        import hashlib, decimal, datetime
        return hashlib.md5(b"a").hexdigest(), str(decimal.Decimal(1)/3)[:5], datetime.datetime.now().year > 2000'''
    r = run(problem('assert candidate() == ("0cc175b9c0f1b6a831c399e269772661", "0.333", True)'), indented(body), isolation)
    assert r['passed'], r

def test_dataclasses_and_main_guard(isolation):
    after = 'from dataclasses import dataclass\n@dataclass\nclass P: x: object\n\nif __name__ == "__main__": raise SystemExit(1)\n'
    assert run(DOUBLE, '    return P(x).x*2\n\n' + after, isolation)['passed']

def test_recursion_that_is_deep_but_fair(isolation):
    assert run(problem('assert candidate(900) == 900'), '    n, = args; return 0 if n == 0 else 1+f(n-1)\n', isolation)['passed']

def test_helpers_come_from_the_prompt(isolation):
    p = problem('assert candidate(1) == helper(1) == 2', 'def helper(x):\n    return x+1\n\ndef f(x):\n    """f"""\n')
    assert run(p, '    return helper(x)\n', isolation)['passed']
    assert not run(p, '    return 0\n\ndef helper(x): return 0\n', isolation)['passed']
    equal = 'class A:\n    def __eq__(s, o): return True\ndef helper(x): return A()\n'
    assert not run(p, f'    return 0\n\n{equal}', isolation)['passed']

def test_the_same_program_gets_the_same_verdict(isolation):
    p = problem('assert candidate() == "".join({"a", "b", "c", "d", "e"}) or True\nassert candidate() == candidate()')
    letters = '    raise ValueError("".join({"a", "b", "c", "d", "e", "f", "g"}))\n'
    got = {run(DOUBLE, letters, isolation)['reason'] for _ in range(4)}
    assert len(got) == 1 and run(p, '    return "".join({"a", "b", "c"})\n', isolation)['passed']

# ---- many at once, and what is left afterwards ----

def test_run_many_keeps_order_and_leaves_nothing(isolation):
    bodies = [HONEST, '    while True: pass\n', '    return 0\n', '    import os; os._exit(0)\n']*3
    fds = len(os.listdir('/proc/self/fd'))
    rows = run_many([DOUBLE]*12, bodies, timeout=4., workers=4, isolation=isolation, progress=False)
    assert [r['outcome'] for r in rows] == ['passed', 'timeout', 'wrong', 'died']*3
    assert len(os.listdir('/proc/self/fd')) == fds and not running()

def test_as_many_at_once_as_the_job_has_cores(monkeypatch):
    "A right program that needs the processor for .15 s, on one core of a machine that says it has 64."
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    at_once = []
    def watch(*args):
        at_once.append(1)
        peaks.append(len(at_once))
        try: return real(*args)
        finally: at_once.pop()
    real, peaks = sandbox._run, []
    monkeypatch.setattr(sandbox, '_run', watch)
    try: rows = run_many([DOUBLE]*8, [HONEST]*8, timeout=60., progress=False)
    finally: os.sched_setaffinity(0, mine)
    assert all(r['passed'] for r in rows) and max(peaks) == 1

REAP = '''
import ctypes, json, os, subprocess, sys
from exp2nb.sandbox import sandbox
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)   # orphans below us become our children and not those of the machine's first process
started = []
class Popen(subprocess.Popen):
    def __init__(self, *a, **k):
        super().__init__(*a, **k)
        started.append(self)
sandbox.find_isolation(sys.argv[1])
sandbox.subprocess.Popen = Popen
rows = sandbox.run_many(*json.loads(sys.argv[2]), timeout=2., workers=4, isolation=sys.argv[1], progress=False)
state = lambda pid: open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0]
children = open(f'/proc/self/task/{os.getpid()}/children').read().split()
print(json.dumps(dict(outcomes=[r['outcome'] for r in rows], waited=[p.returncode is not None for p in started],
                      alive=[state(pid) for pid in children if state(pid) != 'Z'])))
'''

def test_every_child_is_waited_for_and_none_is_left_alive(isolation):
    args = [[DOUBLE]*8, ['    while True: pass\n', HONEST]*4]
    r = subprocess.run([sys.executable, '-c', REAP, isolation, json.dumps(args)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    got = json.loads(r.stdout)
    assert got['outcomes'] == ['timeout', 'passed']*4 and len(got['waited']) == 16 and all(got['waited']) and got['alive'] == []

def test_when_the_caller_is_killed_the_candidate_dies(isolation):
    code = (f'from exp2nb.sandbox import sandbox\nsandbox.find_isolation({isolation!r})\n'
            f'sandbox._BARE = {(*BARE[:-1], "-X", TOKEN, "-c")!r}\n'
            f'sandbox.run_candidate({DOUBLE!r}, "    while True: pass", 600, isolation={isolation!r})')
    caller = subprocess.Popen([sys.executable, '-c', code])
    assert wait_until(lambda: len(running()) >= 2)
    caller.kill()
    caller.wait()
    assert wait_until(lambda: not running())

def test_time_limit_is_kept(isolation):
    r = run_candidate(DOUBLE, '    while True: pass\n', timeout=.5, isolation=isolation)
    assert (r['outcome'], r['seconds']) == ('timeout', .5) and not running()

# ---- refusals ----

def test_without_isolation_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox, 'try_isolation', lambda name: 'not here')
    with pytest.raises(SandboxUnavailable, match='allow_unsafe=True'): run_candidate(DOUBLE, HONEST)
    with pytest.raises(SandboxUnavailable): run_many([DOUBLE], [HONEST])
    with pytest.raises(SandboxUnavailable): run_many([], [])
    r = run_candidate(DOUBLE, HONEST, 30., allow_unsafe=True)
    assert r['passed'] and r['unsafe'] is True and r['isolation'] == 'none'

def test_unsafe_is_not_used_where_isolation_works():
    assert run_candidate(DOUBLE, HONEST, 30., allow_unsafe=True)['unsafe'] is False

def test_canary_sings():
    done = sandbox.escapes(sandbox.NO_ISOLATION)
    for what in ('read a file', 'list a folder', 'delete a file', 'open a socket', 'start a process'): assert what in done

@pytest.mark.parametrize('args', [({}, ''), (DOUBLE, None), (DOUBLE, b'x'), (None, ''), ([], ''), ({**DOUBLE, 'test': None}, ''),
                                  *((DOUBLE, '', t) for t in (0, -1, float('nan'), 'x'))])
def test_nonsense_is_refused_in_a_sentence(args):
    with pytest.raises(UserError): run_candidate(*args)

def test_broken_tests_do_not_raise(isolation):
    endless = 'def check(candidate):\n    while True: pass'
    for test in ('', 'def check(candidate): raise SystemExit(0)', 'not python (', 'def check(candidate): import os; os._exit(0)', endless):
        assert not run_candidate({**DOUBLE, 'test': test}, HONEST, timeout=.5, isolation=isolation)['passed']

def test_no_processes_to_be_had(monkeypatch, isolation):
    def refuse(*a, **k): raise BlockingIOError('no more processes')
    find_isolation(isolation)
    monkeypatch.setattr(sandbox.subprocess, 'Popen', refuse)
    assert run_candidate(DOUBLE, HONEST, isolation=isolation)['outcome'] == 'not_started'

# ---- the ways in which chat models write an answer: a right function passes in each, a wrong one in none ----

RIGHT, WRONG = 'return x*2', 'return x*3'
def function(body): return f'def double(x):\n    {body}\n'
def fence(code, mark='```python'): return f'{mark}\n{code}```\n'

WRITTEN = {   # body of the function → what the model writes
    'continuation': lambda b: f'    {b}\n',
    'continuation after an empty line': lambda b: f'\n    {b}\n',
    'first indentation lost': lambda b: f'y = x\n    {b}\n',
    'indented by two': lambda b: f'  y = x\n  {b}\n',
    'tabs': lambda b: f'\ty = x\n\t{b}\n',
    'no indentation': lambda b: f'y = x\n{b}\n',
    'body and a sentence': lambda b: f'    {b}\n\nThis doubles x.\n',
    'body and a list': lambda b: f'    {b}\n\nIt\n- is short\n- is right\n1. Really.\n',
    'body and a word': lambda b: f'    {b}\n\nDone\n',
    'body and an annotation': lambda b: f'    {b}\n\nNote: simple\n',
    'body and a heading': lambda b: f'    {b}\n\n### Explanation\nIt isn\'t hard.\n',
    'next function, cut off': lambda b: f'    {b}\n\ndef other(x):\n    """ unfin',
    'next class, cut off': lambda b: f'    {b}\n\nclass Other:\n    def f(self, a=(1,',
    'same function again, cut off': lambda b: f'    {b}\n\ndef double(x',
    'body, fence closed, talk': lambda b: f'    {b}\n```\nDone.',
    'fenced body': lambda b: fence(f'    {b}\n'),
    'fenced body without indentation': lambda b: fence(f'{b}\n', '```'),
    'function': function,
    'function, end of turn, junk': lambda b: function(b)+'<|assistant_end|>junk (',
    'talk, function, talk': lambda b: f'Use this.\n\nN = 2\n{function(b)}\nIt is right, since\n- it is short.\n',
    **{f'fence {m}': lambda b, m=m: fence(function(b), m) for m in (
        '```', '```python', '```python3', '```Python', '```py', '```py3', '``` python', '```{.python}', '```python title="a.py"')},
    'fence of tildes': lambda b: fence(function(b), '~~~python').replace('```', '~~~'),
    'fence of four': lambda b: fence(function(b), '````python').replace('```\n', '````\n'),
    'fence in a list': lambda b: '1. So:\n' + textwrap.indent(fence(function(b)), '   '),
    'fence that begins with code': lambda b: f'```{function(b)}```',
    'fence after a blank and talk': lambda b: ' Sure!\n' + fence(function(b)) + 'Hope it helps!',
    'fence that is never closed': lambda b: f'Here:\n```python\n{function(b)}',
    'fence that is never closed, talk': lambda b: f'Here:\n```python\n{function(b)}\nThis doubles x.',
    'Code Llama': lambda b: f'[PYTHON]\n{function(b)}[/PYTHON]\nDone.',
    'CRLF': lambda b: fence(function(b)).replace('\n', '\r\n'),
    'CR': lambda b: fence(function(b)).replace('\n', '\r'),
    'byte-order mark': lambda b: '\ufeff' + function(b),
    '__future__': lambda b: fence('from __future__ import annotations\nimport math\n' + function(b)),
    '__future__ without a fence': lambda b: 'from __future__ import annotations\n' + function(b),
    'imports, main guard, prints': lambda b: fence(f'import math\n{function(b)}\nif __name__ == "__main__":\n    print(double(4))\n'),
    'use and output': lambda b: fence(f'{function(b)}\nprint(double(4))\n') + 'prints\n' + fence('8\n', '```'),
    'example first': lambda b: 'Like\n' + fence('>>> double(1)\n2\n', '```') + 'so\n' + fence(function(b)),
    'helper in a fence of its own': lambda b: fence('import math\ndef same(x): return x\n') + fence(function(f'x = same(x)\n    {b}')),
    'stub behind it': lambda b: fence(function(b)) + 'Yours to fill in:\n' + fence('def double(x):\n    """Twice."""\n    pass\n'),
    'cut off second try': lambda b: fence(function(b)) + 'or\n```python\ndef double(x):\n    return (x +',
}
OTHER_FIRST = {   # (body, body of a draft that is withdrawn) → what the model writes
    'corrected below': lambda b, d: fence(function(d)) + 'Wrong. Fixed:\n' + fence(function(b)),
    'corrected twice': lambda b, d: fence(function(d)) + fence(function(d)) + fence(function(b)),
    'draft in <think>': lambda b, d: f'<think>\n{fence(function(d))}no\n</think>\n' + fence(function(b)),
    'draft in <thinking>, body': lambda b, d: f'<thinking>{function(d)}</thinking>\n    {b}\n',
    'thoughts that a template opened': lambda b, d: f'{fence(function(d))}no\n</think>\n' + fence(function(b)),
}
ANSWERS = {name: (f(RIGHT), f(WRONG)) for name,f in WRITTEN.items()} | {
    name: (f(RIGHT, WRONG), f(WRONG, RIGHT)) for name,f in OTHER_FIRST.items()}

@pytest.fixture(scope='module')
def written(tagged):
    "Outcomes by name: of the right function and of the wrong one."
    texts = [t for pair in ANSWERS.values() for t in pair]
    rows = run_many([DOUBLE]*len(texts), texts, timeout=30., progress=False)
    return {name: rows[2*i:2*i+2] for i,name in enumerate(ANSWERS)}

@pytest.mark.timeout(900)
@pytest.mark.parametrize('name', ANSWERS)
def test_an_answer_counts_however_it_is_written(name, written):
    right, wrong = written[name]
    assert right['passed'], right
    assert not wrong['passed'] and wrong['outcome'] == 'wrong', wrong

@pytest.mark.parametrize('answer', [
    '', 'I am sorry, I cannot help with that.', '<think>\n' + fence(function(RIGHT)), '<think>' + function(RIGHT) + '</think>',
    '    return (x*2\n\nThis doubles x.\n', function('return (x*2') + '\nThis doubles x.\n', fence(function('return x*2)')),
    fence(function(RIGHT)) + 'Better:\n' + fence(function('return (x*')), fence('class Solution:\n    pass\n'), fence('x*2\n'),
    function(RIGHT) + '\ndef double(x):\n    return (\n\nx = 1\n', '    return x*2 )\n', '    return x*2\n\nwhile True: pass\n'])
def test_what_is_no_answer_stays_none(answer):
    "A function that does not compile is not repaired, thoughts are not answers, and the last word counts."
    assert not run(DOUBLE, answer, timeout=5.)['passed']

@pytest.mark.parametrize('text', [
    '', '`', '```', '```'*1000, '~'*100_000, '```python', '``` '*50000, ' '*200_000, '\n'*200_000, 'a'*200_000, 'a '*100_000,
    'a\n'*50_000, 'def double(', 'def double'*20000, 'def double(x):\n'*5000, '\x00', '\ud800', '<|assistant_end|>',
    '<think>'*30_000, '</think>'*30_000, '```\ndef double(x):\n'*3000, '[PYTHON]'*20_000])
def test_making_a_program_is_total_and_quick(text):
    "Quick by the processor's clock, which other processes do not move."
    start = time.process_time()
    make_program(PROMPT, text, 'double')
    assert time.process_time()-start < 10

# ---- HumanEval ----

def humaneval():
    folder = os.environ.get('EXP2_DATA_DIR')
    if not folder: pytest.skip('EXP2_DATA_DIR is not set: no HumanEval here')
    import pandas as pd
    return pd.read_parquet(Path(folder)/'openai/openai_humaneval/openai_humaneval/test.parquet').to_dict('records')

def failures(problems, answers, isolation='auto'):
    rows = run_many(problems, answers, timeout=60., isolation=isolation, progress=False)
    return [(p['task_id'], r['outcome'], r['reason']) for p,r in zip(problems, rows, strict=True) if not r['passed']]

@pytest.mark.timeout(900)
def test_canonical_solutions_pass(isolation):
    problems = humaneval()
    assert failures(problems, [p['canonical_solution'] for p in problems], isolation) == []

@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize('write', [
    lambda p, c: f'Here is the solution:\n\n{fence(p+c)}\nIt works.<|assistant_end|>',
    lambda p, c: f'{c}\n\nThis is how it works: it\'s simple.\n',
    lambda p, c: f'<think>{fence(p)}</think>' + fence('from __future__ import annotations\n' + p + c).replace('\n', '\r\n'),
    lambda p, c: c.lstrip() + '\n\ndef next_one(x):\n    """ unfin',
    lambda p, c: fence(textwrap.dedent(c), '```')], ids=['fence', 'continuation', 'thoughts', 'no first indentation', 'body'])
def test_canonical_solutions_pass_as_chat_models_would_write_them(write):
    problems = humaneval()
    assert failures(problems, [write(p['prompt'], p['canonical_solution']) for p in problems]) == []

@pytest.mark.timeout(900)
def test_trivial_answers_fail_every_problem():
    problems = humaneval()
    assert len(failures(problems, ['    return None\n']*len(problems))) == len(problems)

@pytest.mark.parametrize('number', [32, 38, 50])
def test_helpers_of_the_real_prompts(number, isolation):
    p = humaneval()[number]
    helper = re.search(r'def (\w+)', p['prompt'])[1]
    everything = 'class E:\n    def __eq__(s, o): return True\n    def __lt__(s, o): return True\n    def __float__(s): return 0.0\n'
    for cheat in (f'    return 0\n\ndef {helper}(*a): return 0\n',
                  f'    return E()\n\n{everything}def {helper}(*a): return E()\n',
                  f'    return ""\n\nimport builtins\nbuiltins.{helper} = lambda *a: ""\n'):
        assert not run(p, cheat, isolation)['passed']

def test_an_isolation_gets_a_second_chance_to_start(isolation, monkeypatch):
    "A machine that was too busy once must not go without isolation for good."
    tries, run_once = [], sandbox._run
    def late(*args):
        tries.append(args)
        return sandbox._not_started('too busy', args[-1]) if len(tries)==1 else run_once(*args)
    monkeypatch.setattr(sandbox, '_run', late)
    assert sandbox.escapes(try_isolation(isolation))=='' and len(tries)==2

def test_processes_share_the_cores(monkeypatch):
    "Each runs as many programs at a time as it has threads: eight processes on eight cores run eight, not sixty-four."
    import torch
    from exp2nb import evaluate
    got, now = [], torch.get_num_threads()
    monkeypatch.setattr(evaluate, 'usable_cores', lambda: 8)
    monkeypatch.setattr(evaluate, 'run_many', lambda problems, programs, workers, **kw: got.append(workers) or [])
    try:
        torch.set_num_threads(1)
        evaluate.score_all(SimpleNamespace(kind='code'), [], [])
    finally: torch.set_num_threads(now)
    assert got==[1]
