"""The child that grade.run_program starts: contain one program, test it, say how it ended.

    python -s -S sandbox.py CONTAINMENT CPU WALL < program.json    # seconds; in an empty folder

Three processes. The keeper (this one) is outside of the containment and prints one word of REASONS.
In two contained children of it, which share nothing but two pipes, run the answer and the tests:
the tests call a stand-in, which sends its arguments, as plain values, to the answer's process and
returns what comes back, as plain values. So whatever the answer redefines, patches, traces or
claims, the tests see numbers, texts and containers. program.json: answer; helpers and tests, which
the tests' process runs; names, which of the answer's functions and classes the tests may call.

The containments, best first (grade.containment chooses):

    namespaces  Linux: pid, mount, network and IPC namespaces of its own, a user namespace too (as
                root a user id that nobody else has). The root folder is a small tmpfs with the
                Python installation and the system's libraries in it, read-only; everything else,
                the home folder included, is not there. Processes end with their namespace.
    user        root where namespaces are refused: a user id that nobody else has
    limits      resource limits alone: they stop accidents, not attackers

In each: limits on wall and CPU time, memory, processes, file size and open files; a session of
its own; output thrown away; no environment, no input, no inherited file.

What is still possible: a program can recognise the arguments of known tests and return what they
expect, and it builds the objects that an MBPP problem sets up from the answer's classes; under
"user" and "limits" it can attack the tests' process as its own user. Memory is limited for each
process and, as root with namespaces, for System V segments, not for all together.
None of this stops an attack on the kernel.
"""
import contextlib
import ctypes
import fcntl
import json
import math
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Iterator, KeysView, ValuesView

REASONS = ("passed", "failed", "error", "memory", "timeout", "ended", "sandbox")
MEMORY = 512 << 20                       # bytes of address space a process
PROCESSES = 8                            # processes and threads in all
OPEN_FILES = 32
FILE_SIZE = 16 << 20                     # bytes a file, and the same for the whole scratch folder
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
LINUX = sys.platform == "linux"

# Numbers of the Linux kernel: <sched.h>, <sys/mount.h>, <sys/prctl.h>, <linux/capability.h>.
NEW_NS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = (
    1, 2, 4, 32, 4096, 16384, 1 << 18)
DETACH = 2
PARENT_DEATH_SIGNAL, DUMPABLE, SUBREAPER, NO_NEW_PRIVILEGES = 1, 4, 36, 38
CAPABILITY_VERSION = 0x20080522


def call(name: str, *arguments):
    """A function of the C library; a failure is an OSError."""
    arguments = [os.fsencode(a) if isinstance(a, str) else a for a in arguments]
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


# ---------------------------------------------------------------- containment

def enter_namespaces():
    """Leave the keeper's mounts, network and user ids behind; children get process ids anew."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", NEW_NS | NEW_IPC | NEW_PID | NEW_NET | (NEW_USER if user else 0))
    if user:             # as themselves, never as root: a program that is no root has no privileges
        for file, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"),
                           ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{file}", "w") as out:
                out.write(line)
    else:
        with contextlib.suppress(OSError), open("/proc/sys/kernel/shmall", "w") as limit:
            limit.write(str(MEMORY >> 12))           # pages of System V shared memory, of them all


def hide_files(scratch: str):
    """Make an empty tmpfs with the libraries, read-only, the root; the scratch folder is /scratch.

    Works on the mount namespace of this process: call it after enter_namespaces.
    """
    os.umask(0o022)
    call("mount", None, "/", None, RECURSIVE | PRIVATE, None)
    call("mount", "tmpfs", scratch, "tmpfs", NO_SUID | NO_DEVICES, "size=64k,mode=755")
    for folder in (*LIBRARIES, sys.base_prefix):
        inside = scratch + folder
        if os.path.isdir(folder) and not os.path.isdir(inside):
            os.makedirs(inside)
            call("mount", folder, inside, None, BIND | RECURSIVE, None)
            call("mount", None, inside, None, BIND | REMOUNT | READ_ONLY | NO_SUID | NO_DEVICES,
                 None)
    os.mkdir(f"{scratch}/dev")
    open(f"{scratch}/dev/null", "w").close()
    call("mount", "/dev/null", f"{scratch}/dev/null", None, BIND, None)
    os.mkdir(f"{scratch}/scratch")
    call("mount", "tmpfs", f"{scratch}/scratch", "tmpfs", NO_SUID | NO_DEVICES,
         f"size={FILE_SIZE},nr_inodes=500")
    os.chdir(scratch)
    call("pivot_root", ".", ".")                # the old root now lies over the new one
    call("umount2", ".", DETACH)
    call("mount", None, "/", None, REMOUNT | READ_ONLY | NO_SUID | NO_DEVICES, None)
    os.chdir("/scratch")


def give_up_rights(containment: str, keeper: int, cpu: int):
    """Limits for this process and its children, and no way back to more rights."""
    os.environ.clear()
    limits = {resource.RLIMIT_CPU: cpu, resource.RLIMIT_AS: MEMORY,
              resource.RLIMIT_FSIZE: FILE_SIZE, resource.RLIMIT_NPROC: PROCESSES,
              resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        with contextlib.suppress(ValueError, OSError):      # not every system has every limit
            resource.setrlimit(limit, (value, value))
    if os.geteuid() == 0 and containment != "limits":
        own = 1 << 30 | keeper               # RLIMIT_NPROC counts by user id, and exempts root
        os.chown(".", own, own)
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
    if LINUX:
        call("prctl", PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)     # a change of ids undoes it
        call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())


def close_files(*kept: int) -> list[int]:
    """Nothing to read, nowhere to write but these pipes: their numbers from now on, 3, 4, ..."""
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in kept]
    moved = [os.dup2(fd, 3 + i, inheritable=False) for i, fd in enumerate(high)]
    os.closerange(3 + len(moved), 100)                      # the keeper has a handful
    return moved


# ---------------------------------------------------------------- plain values

CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "bytes": bytes,
              "iter": (Iterator, range, KeysView, ValuesView)}


class Object:
    """What the tests hold in place of an object of the answer's process."""

    def __init__(self, number: int):
        self.number = number


def pack(x, objects: list):
    """A value as JSON: containers and numbers by kind; anything else stays and is named by its
    place in `objects`, so that the tests can hand it back."""
    if x is None:
        return None
    for kind in (bool, int, float, str):                    # a subclass may compare as it likes
        if isinstance(x, kind):
            return kind(x)
    if isinstance(x, dict):
        return ["dict", [[pack(k, objects), pack(v, objects)] for k, v in dict.items(x)]]
    if isinstance(x, complex):
        return ["complex", [x.real, x.imag]]
    for name, kind in CONTAINERS.items():
        if isinstance(x, kind):
            return [name, [pack(item, objects) for item in x]]
    if isinstance(x, Object):
        return ["object", x.number]
    objects.append(x)
    return ["object", len(objects) - 1]


def unpack(x, known):
    """The value again; known(number) is what stands for an object."""
    if not isinstance(x, list):
        return x
    kind, held = x
    if kind == "object":
        return known(held)
    if kind == "dict":
        return {unpack(k, known): unpack(v, known) for k, v in held}
    if kind == "complex":
        return complex(*held)
    items = [unpack(item, known) for item in held]
    return iter(items) if kind == "iter" else CONTAINERS[kind](items)


# ---------------------------------------------------------------- the two children

def word_for(error: BaseException) -> str:
    """Which of REASONS an exception is."""
    for kind, word in ((MemoryError, "memory"), (AssertionError, "failed"), (Exception, "error")):
        if isinstance(error, kind):
            return word
    return "ended"                                          # SystemExit, KeyboardInterrupt


def answer_calls(answer: str, requests: int, replies: int):
    """Run the answer, then call what is asked for and send back what it returns or how it ended."""
    module, objects = types.ModuleType("program"), []
    sys.modules["program"] = module             # not __main__: examples of use do not run
    requests, replies = open(requests, encoding="utf-8"), open(replies, "w", encoding="utf-8")
    line = "[]"
    while line:
        try:
            if line == "[]":
                exec(compile(answer, "program.py", "exec"), module.__dict__)
                reply = ["value", None]
            else:
                name, args, named = json.loads(line)
                args, named = (unpack(x, objects.__getitem__) for x in (args, named))
                reply = ["value", pack(getattr(module, name)(*args, **named), objects)]
        except BaseException as error:
            reply = [word_for(error), None]
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        line = requests.readline()


class Ended(BaseException):
    """The answer's process did not return a value; the word says why."""


def run_tests(program: dict, requests: int, replies: int, report: int):
    """Run helpers and tests with stand-ins for the answer's names, and report a word."""
    requests, replies = open(requests, "w", encoding="utf-8"), open(replies, encoding="utf-8")

    def reply():
        line = replies.readline()
        word, value = json.loads(line) if line else ("", None)
        if word != "value":
            raise Ended(word)
        return unpack(value, Object)

    def ask(name):
        def stand_in(*args, **named):
            requests.write(json.dumps([name, pack(args, []), pack(named, [])]) + "\n")
            requests.flush()
            return reply()
        return stand_in

    space = types.ModuleType("tests").__dict__
    try:
        exec(compile(program["helpers"], "helpers.py", "exec"), space)
        space.update({name: ask(name) for name in program["names"]})
        reply()
        exec(compile(program["tests"], "tests.py", "exec"), space)
        word = "passed"
    except Ended as end:
        word = str(end) if str(end) in REASONS[1:] else ""
    except BrokenPipeError:
        word = ""
    except BaseException as error:
        word = word_for(error)
    os.write(report, word.encode())


# ---------------------------------------------------------------- the keeper

def end_all():
    """Kill what is left of the program, orphans included, until nothing is; ten seconds at most.

    In a process namespace the kernel does it.
    """
    deadline = time.monotonic() + 10
    children = f"/proc/self/task/{os.getpid()}/children"
    with contextlib.suppress(ChildProcessError):           # raised when there is no child any more
        while time.monotonic() < deadline:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            with contextlib.suppress(FileNotFoundError), open(children) as file:
                for child in file.read().split():
                    os.kill(int(child), signal.SIGKILL)
            time.sleep(0.002)


def keep(containment: str, cpu: int, wall: float) -> str:
    """Run the program on standard input in a contained child: one of REASONS.

    cpu and wall: seconds. The CPU's are what a program is given; wall time ends those that wait.
    """
    program = json.load(sys.stdin)
    (reading, report), (asking, asked), (saying, said) = os.pipe(), os.pipe(), os.pipe()
    if LINUX:
        call("prctl", SUBREAPER, 1, 0, 0, 0)
    if containment == "namespaces":
        enter_namespaces()
        hide_files(os.getcwd())
    if LINUX:                     # before the children fork: no other process reads their memory
        call("prctl", DUMPABLE, 0, 0, 0, 0)
        call("prctl", PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    keeper = os.getpid()

    def contained(run, *pipes: int) -> int:
        """A child that is contained, keeps these pipes and runs."""
        child, leave = os.fork(), os._exit                  # which the answer may patch
        if child:
            return child
        try:
            if containment == "namespaces":
                os.setsid()
            pipes = close_files(*pipes)
            give_up_rights(containment, keeper, cpu)
            if os.getppid() in (0, keeper):                 # else it ended before the signal
                sys.set_int_max_str_digits(0)
                run(*pipes)
        finally:
            leave(1)
    # The tests' process first: in a process namespace it is the one with which all others end.
    tests = contained(lambda *pipes: run_tests(program, *pipes), asked, saying, report)
    answer = contained(lambda *pipes: answer_calls(program["answer"], *pipes), asking, said)
    for pipe in (report, asking, asked, saying, said):
        os.close(pipe)
    ready = select.select([reading], [], [], wall)[0]
    word = os.read(reading, 100).decode(errors="replace") if ready else "timeout"
    for child in (tests, answer):
        os.kill(child, signal.SIGKILL)
    used = os.wait4(answer, 0)[2]
    end_all()
    if word:
        return word if word in REASONS else "ended"
    # The kernel counts ticks for the limit, and run time for what was used: they differ a little.
    return "timeout" if used.ru_utime + used.ru_stime > 0.8 * cpu else "ended"


def main():
    """The command line's arguments to keep, and its answer printed."""
    try:
        print(keep(sys.argv[1], math.ceil(float(sys.argv[2])), float(sys.argv[3])))
    except OSError as error:                    # the containment's: the program's stay with it
        print("sandbox")
        sys.exit(f"sandbox.py: {error}")


if __name__ == "__main__":
    sys.path.pop(0)                             # this file's folder: the program imports none of it
    main()
