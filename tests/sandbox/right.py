"""Right programs as models write them: each must pass, with ``f(2) == 3``."""

from __future__ import annotations

_WRITTEN = r'''
## main guard
def f(x):
    return x + 1
if __name__ == '__main__':
    print(f(int(input())))
## reads an empty input
def f(x):
    return x + 1
import sys
assert sys.stdin.read() == '' and [*sys.stdin] == []
try:
    input('n: ')
except EOFError:
    pass
## prints
def f(x):
    return x + 1
import sys
print('🎉 done ✓', 'x' * 10 ** 7)
sys.stdout.buffer.write(b'x')
sys.stderr.write('x')
## changes its streams
def f(x):
    return x + 1
import io, sys
sys.stdin = io.StringIO('5\n')
assert input() == '5'
sys.stdout.close()
sys.stdout = sys.stderr = io.StringIO()
print('x')
## identifiers
π = 3.14
def größe(ä):
    """返回"""
    return ä + 1
f = größe
## names of builtins
def sum(a, b): return a + b
def print(*a): pass
list = str = dict = isinstance = len = open = exec = None
def f(x):
    max = sum(x, 1)
    return max
## own checks
def f(x):
    return x + 1
def check(f):
    assert f(0) == 1
check(f)
assert f(2) == 3
## typing and classes
from __future__ import annotations
from typing import *
import collections, copy, dataclasses, enum, pickle
T = TypeVar('T')
Pair = collections.namedtuple('Pair', 'a b')
class Kind(enum.IntEnum):
    three = 3
@dataclasses.dataclass(order=True, slots=True)
class A(Generic[T]):
    v: int = 1
    b: List[int] = dataclasses.field(default_factory=list)
def f(x: int | None) -> Optional[int]:
    assert pickle.loads(pickle.dumps(Pair(1, 2))) == Pair(1, 2)
    assert copy.deepcopy(A(2)) == A(2) > A(1)
    return Kind(x + 1)
## functions
import functools, itertools
count = 0
@functools.lru_cache(maxsize=None)
def g(x, memo={}):
    global count
    count += 1
    return sum(itertools.islice(itertools.repeat(1), x))
f = functools.partial(lambda one, x: g(x) + one, 1)
## recursion
import sys
sys.setrecursionlimit(10 ** 6)
def g(n): return 0 if n == 0 else 1 + g(n - 1)
def f(x): return x + g(20000) - 19999
## a deep stack
import resource, sys, threading
no = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_STACK, (no, no))
threading.stack_size(2 ** 27)
out = []
def main():
    out.append(1)
t = threading.Thread(target=main)
t.start()
t.join()
def f(x): return x + out[0]
## threads
import queue, threading
from concurrent.futures import ThreadPoolExecutor
threading.Timer(99, print).start()
def f(x):
    q = queue.Queue()
    for i in range(100):
        t = threading.Thread(target=q.put, args=(i,))
        t.start()
        t.join()
    assert q.qsize() == 100
    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(int, [x] + [0] * 40 + [1]))
## asyncio
import asyncio
async def g(x):
    await asyncio.sleep(0.001)
    return x
async def main(x):
    return sum(await asyncio.gather(g(x), g(0))) + await asyncio.to_thread(int, 1)
def f(x): return asyncio.run(main(x))
## signals
import signal
class Late(Exception): pass
def late(*_): raise Late
def f(x):
    signal.signal(signal.SIGALRM, late)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        while True: pass
    except Late:
        return x + 1
## looks at itself
import cProfile, gc, inspect, logging, sys, traceback, tracemalloc, warnings
logging.basicConfig(level=0)
def f(x):
    try: 1 / 0
    except ZeroDivisionError:
        traceback.print_exc()
        traceback.print_stack()
        logging.exception('x')
    assert inspect.currentframe().f_code.co_name == 'f' and gc.get_objects()
    warnings.warn('x')
    sys.settrace(lambda *_: None)
    sys.settrace(None)
    tracemalloc.start()
    with cProfile.Profile(): return x + 1
## tests itself
def f(x):
    return x + 1
import doctest, unittest
from unittest import mock
doctest.testmod()
class T(unittest.TestCase):
    def test(self): self.assertEqual(f(2), 3)
unittest.main(argv=[''], exit=False)
## time and chance
import datetime, random, secrets, time, uuid, zoneinfo
random.seed(42)
uuid.uuid1()
secrets.token_hex()
datetime.datetime.now(zoneinfo.ZoneInfo('UTC'))
def f(x):
    time.sleep(0.05)
    return random.choice([x + 1]) + 0 * int(open('/dev/urandom', 'rb').read(1)[0])
## memory and work
def f(x):
    a, n = bytearray(300 << 20), 0
    for _ in range(10 ** 6): n += 1
    return x + n - 10 ** 6 + 1
## the standard library
import argparse, array, bisect, csv, ctypes, hashlib, heapq, html, io, json, locale, math, multiprocessing, os
import pathlib, platform, pprint, re, shutil, socket, sqlite3, statistics, string, subprocess, tempfile, urllib
argparse.ArgumentParser().parse_args()
platform.platform()
assert os.listdir() == [] and os.getcwd()
def f(x):
    one = sqlite3.connect(':memory:').execute('select 1').fetchone()[0]
    with tempfile.SpooledTemporaryFile() as file: file.write(b'x')
    return ctypes.c_int(x).value + one * len(re.findall('\d', '5'))
## numpy
import numpy as np
def f(x): return np.linalg.inv(np.eye(1)).astype(int)[0, 0] * x + np.int64(1)
## sympy
from sympy import Integer, isprime, solve, symbols
y = symbols('y')
def f(x): return solve(y - x - 1)[0]
## Decimal
from decimal import Decimal
def f(x): return Decimal(x) + Decimal('1.0')
## Fraction
from fractions import Fraction
def f(x): return Fraction(x) + 1
## int of its own
class N(int):
    def __eq__(self, other): return False
def f(x): return N(x + 1)
'''
RIGHT = dict(one.split("\n", 1) for one in _WRITTEN.split("\n## ")[1:])
RIGHT["line ends and tabs"] = "def f(x):\r\n\tif x:\r\n\t\treturn x + 1\r\n# a\r\n"
