"""Programs that try to do harm, each with how it must end: a pattern for the reason that the sandbox gives.

VICTIM is a file and FOLDER a folder of the user running the tests, PORT a port that listens on this machine.
"""

from __future__ import annotations

REFUSED = r"OSError: \[Errno 38\]|PermissionError"
RAISED = "not allowed to raise"
TIMED_OUT = "timed out"
KEEP = "import os, sys, signal, ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"

HOSTILE: dict[str, tuple[str, str]] = {
    "fork bomb": ("while True: os.fork()", REFUSED),
    "thread bomb": (
        "import threading, time\nthreading.stack_size(32768)\nn = 1\ntry:\n"
        "    while True:\n        threading.Thread(target=time.sleep, args=[9]).start()\n        n += 1\n"
        "except RuntimeError: raise SystemExit(n)",
        "SystemExit: 32$",
    ),
    "thread bomb by threads": (
        "import threading\nthreading.stack_size(32768)\ndef more():\n    while True:\n"
        "        try: threading.Thread(target=more).start()\n        except RuntimeError: pass\nmore()",
        TIMED_OUT,
    ),
    "threads that work": (
        "import threading\nfor _ in range(8): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\n"
        "while True: pass",
        TIMED_OUT,
    ),
    "processes by the side door": (
        "for flags in (17, 0x4111, 0x10000011, 0x3D0F00 | 1 << 28):\n"
        "    found = libc.syscall(56, flags, 0, 0, 0, 0)\n"
        "    if found >= 0: os._exit(7) if found == 0 else sys.exit('it was allowed')\n"
        "raise SystemExit('none')",
        "none",
    ),
    "starts a program": ("import subprocess\nsubprocess.Popen(['/bin/sleep', '1000'])", REFUSED),
    "becomes another program": ("os.execv('/bin/sleep', ['sleep', '1000'])", REFUSED),
    "daemonises": ("os.fork() and os._exit(0)\nos.setsid()\nos.fork() and os._exit(0)\nsignal.pause()", REFUSED),
    "leaves its session": ("os.setsid()", REFUSED),
    "memory bomb": ("kept = []\nwhile True: kept.append(bytearray(1 << 20))", "MemoryError"),
    "memory in answers": ("def g(): return ['x' * (100 << 20)] * 9\ng = [*map(str.upper, g())]", "MemoryError"),
    "memory in pipes and files": ("fd = libc.memfd_create(b'x', 0)\nos.write(fd, b'x')", "OSError"),
    "shared memory that stays": ("raise SystemExit(libc.shmget(0, 1 << 20, 0o1666))", "SystemExit: -1"),
    "endless loop": ("while True: pass", TIMED_OUT),
    "one endless operation": ("9 ** 9 ** 9", f"{TIMED_OUT}|MemoryError"),
    "sleeps for ever": ("import time\nwhile True: time.sleep(1000)", TIMED_OUT),
    "does not hear signals": (
        "for n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True:\n    try: raise KeyboardInterrupt\n    except BaseException: pass",
        TIMED_OUT,
    ),
    "kills its parent": ("os.kill(os.getppid(), signal.SIGKILL)", REFUSED),
    "kills its group": ("os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)", REFUSED),
    "kills everybody": ("os.kill(-1, signal.SIGKILL)", REFUSED),
    "has a pipe send signals": (
        "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())\n"
        "fcntl.fcntl(r, 10, signal.SIGKILL)\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')",
        REFUSED,
    ),
    "writes to another's file": ("open('VICTIM', 'w').write('gone')", REFUSED),
    "truncates another's file": ("os.truncate('VICTIM', 0)", REFUSED),
    "deletes another's files": ("import shutil\nshutil.rmtree('FOLDER')", REFUSED),
    "renames another's file": ("os.rename('VICTIM', 'VICTIM.gone')", REFUSED),
    "opens a file to all": ("os.chmod('VICTIM', 0o777)", REFUSED),
    "symlink tricks": ("os.symlink('VICTIM', 'here')\nopen('here', 'w').write('gone')", REFUSED),
    "hard link tricks": ("os.link('VICTIM', 'here')", REFUSED),
    "fills the disk": ("with open('big', 'wb') as file:\n    while True: file.write(bytes(1 << 20))", REFUSED),
    "many small files": ("for n in range(10 ** 6): open(str(n), 'w').close()", REFUSED),
    "opens 100,000 files": ("kept = [open(os.__file__) for _ in range(10 ** 5)]", r"Errno 24\] Too many open files"),
    "connects to a port": ("import socket\nsocket.create_connection(('127.0.0.1', PORT))", REFUSED),
    "listens": ("import socket\nsocket.create_server(('127.0.0.1', 0))", REFUSED),
    "talks to a local service": ("import socket\nsocket.socket(socket.AF_UNIX)", REFUSED),
    "talks by a pair": ("import socket\nsocket.socketpair()[0].sendto(b'x', '/run/x')", REFUSED),
    "talks by a pair of datagrams": ("import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)", REFUSED),
    "sends descriptors": ("import socket\nsocket.send_fds(socket.socketpair()[0], [b'x'], [0])", REFUSED),
    "sockets by the side door": (
        "raise SystemExit(libc.syscall(425, 8, ctypes.create_string_buffer(256)))",
        "Exit: -1",
    ),
    "calls by other numbers": ("raise SystemExit(libc.syscall(0x40000000 + 41, 2, 1, 0))", "SystemExit: -1"),
    "its environment": ("raise SystemExit(str(dict(os.environ)))", r"SystemExit: \{"),
    "its parent's environment": ("print(open(f'/proc/{os.getppid()}/environ').read())", REFUSED),
    "its parent's memory": ("open(f'/proc/{os.getppid()}/mem', 'rb').read(1)", REFUSED),
    "its parent's descriptors": ("print(os.listdir(f'/proc/{os.getppid()}/fd'))", REFUSED),
    "traces its parent": ("raise SystemExit(libc.ptrace(16, os.getppid(), 0, 0))", "SystemExit: -1"),
    "reads a private file": ("raise SystemExit(open('VICTIM').read())", REFUSED),
    "looks around": ("print(os.listdir('FOLDER'))", REFUSED),
    "reads who the users are": ("print(open('/etc/passwd').read())", REFUSED),
    "prints for ever": ("while True: print('x' * 10 ** 6)", TIMED_OUT),
    "floods the result": (
        "for fd in range(3, 64):\n    try:\n        while True: os.write(fd, b'x' * 10 ** 5)\n    except OSError: pass",
        "ended early",
    ),
    "exits in good order": ("sys.exit(0)", "SystemExit: 0"),
    "exits at once": ("os._exit(0)", r"ended early \(status 0\)"),
    "fakes the result": (
        "for fd in range(3, 64):\n    try: os.write(fd, b'passed')\n    except OSError: pass\nos._exit(0)",
        "ended early",
    ),
    "replaces the checks": (
        "def check(candidate): pass\nimport builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
        "os.write = os._exit = print",
        "AssertionError",
    ),
    "raises its limits": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10 ** 6, 10 ** 6))", RAISED),
    "raises its limits another way": (
        "import resource\nresource.prlimit(0, resource.RLIMIT_AS, (1 << 40,) * 2)",
        f"{REFUSED}|{RAISED}",
    ),
    "lowers its parent's limits": (
        "import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        REFUSED,
    ),
    "endless recursion": ("sys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()", f"{TIMED_OUT}|ended early|MemoryError"),
    "crashes the interpreter": ("ctypes.string_at(0)", r"ended early \(status -11\)"),
    "makes itself root": ("os.setuid(0)", REFUSED),
    "mounts": ("raise SystemExit(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))", "SystemExit: -1"),
    "namespaces of its own": ("raise SystemExit(libc.unshare(0x10000000))", "SystemExit: -1"),
}
