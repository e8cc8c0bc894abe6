"""Wrong programs, written to be graded as right: none may pass. ``f(2)`` must be 3, and is not."""

from __future__ import annotations

WRONG = "def f(x): return 0\n"
EVERYTHING = (
    "class Any:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
    "    def __sub__(self, other): return 0\n    def __abs__(self): return 0\n"
    "    def __lt__(self, other): return True\n"
    "    def __getattr__(self, name): return lambda *a: True\n    __hash__ = object.__hash__\n    __rsub__ = __sub__\n"
)
WRITES = (
    "import os\ndef f(x):\n    for fd in range(3, 32):\n        try: os.write(fd, b'TEXT')\n"
    "        except OSError: pass\n    return 0"
)
ANSWERS = {  # what ``f`` gives
    "an object": "Any()",
    **{f"a kind of {kind}": f"type('A', (Any, {kind}), {{}})()" for kind in ("int", "float", "str", "list", "dict")},
    "a class": "type('Meta', (Any, type), {})('A', (), {})",
    "a Decimal": "type('Decimal', (Any,), {'__str__': lambda self: 'NaN'})()",
    "a set": "__import__('collections').abc.Set.register(Any) and Any()",
    "a number": "__import__('numbers').Real.register(Any) and Any()",
    "ANY": "__import__('unittest.mock').mock.ANY",
    "an array": "__import__('numpy').zeros(1).view(type('A', (Any, __import__('numpy').ndarray), {}))",
    "an empty array": "__import__('numpy').zeros(0)",
    "a list of objects": "[Any()]",
    "a list of itself": "(lambda one: one.append(one) or one)([])",
    "a text": "'4'",
    "nothing": "None",
    "no end": "__import__('itertools').count()",
}
ENDS = (
    *("raise StopIteration", "raise GeneratorExit", "raise SystemExit(0)", "raise AssertionError", "os._exit(0)"),
    *("os.abort()", "os.kill(os.getpid(), 9)", "os.closerange(0, 99)", "ctypes.CDLL(None).exit(0)"),
    *("ctypes.string_at(0)", "raise type('passed', (BaseException,), {})('passed')"),
)
SENT = (  # what it sends by itself
    *("passed", "passed\\n", '"passed"\\n', '""\\n', "null\\n", "[]\\n", '[{"a": 1}]\\n', '[["type", "eval"]]\\n'),
    *(
        '[["numpy", "|O", [1], "00"]]\\n',
        '[["numpy", "<i8", [0], ""]]\\n',
        '[["object", 9]]\\n',
        '[["object", "f"]]\\n',
    ),
    *('[["list", 5]]\\n', '[["Decimal", "sNaN"]]\\n', '[["exec", "check = print"]]\\n'),
)
PATCHES = {
    "the checks": "def check(f): pass\nimport builtins, __main__\nbuiltins.check = __main__.check = check",
    "builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = SystemExit",
    "a module": "import sys, types\nsys.modules['math'] = types.SimpleNamespace(fabs=lambda x: 0)",
    "imports": "import sys\nsys.modules.clear()\nsys.meta_path.clear()\nsys.path_hooks.clear()",
    "int": (
        "import ctypes, gc\ngc.get_referents(int.__dict__)[0]['__eq__'] = lambda a, b: True\n"
        "ctypes.pythonapi.PyType_Modified(ctypes.py_object(int))"
    ),
    "a number's memory": "import ctypes\nctypes.memset(id(3) + 24, 0, 4)",
    "the worker": (
        "import sys\nworker = sys.modules['worker.messages']\nworker.encode = lambda *a: True\n"
        "frame = sys._getframe()\nwhile frame:\n    for one in frame.f_locals.values():\n"
        "        if isinstance(one, dict) and 'program' in one: one.update(checks=[], tested=[])\n"
        "    frame = frame.f_back"
    ),
    "tracing": "import sys, threading\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)",
    "asserts": "import os, sys\nos.environ['PYTHONOPTIMIZE'] = '2'\nsys.flags = None",
    "the end": "import atexit, os, signal\natexit.register(os._exit, 0)\nsignal.signal(15, lambda *a: os._exit(0))",
    "memory of others": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nfor pid in (os.getppid(), os.getpid() - 1, os.getpid() + 1):\n"
        "    assert libc.ptrace(16, pid, 0, 0) < 0 and libc.process_vm_readv(pid, 0, 0, 0, 0, 0) < 0\n"
        "    for name in ('mem', 'fd/0', 'cmdline'):\n        try: open(f'/proc/{pid}/{name}')\n"
        "        except OSError: pass\n        else: f = lambda x: 3"
    ),
}
CHEATS: dict[str, str] = {
    **{f"answers with {name}": f"{EVERYTHING}def f(x): return {text}" for name, text in ANSWERS.items()},
    **{f"{text}, at once": f"import ctypes, os\n{text}" for text in ENDS},
    **{f"{text}, when called": f"import ctypes, os\ndef f(x): {text}" for text in ENDS},
    **{f"sends {text}": WRITES.replace("TEXT", text) for text in SENT},
    **{f"changes {name}": WRONG + text for name, text in PATCHES.items()},
}
