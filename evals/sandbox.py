"""The child that grade.run_program starts: contain one program, test it, say how it ended.

    python -s -S sandbox.py CONTAINMENT SECONDS < program.json     # in an empty folder

Two processes, joined by a socket. The keeper (this one) runs the tests and prints one word of
REASONS; its child runs the answer. The tests call a stand-in: it sends its arguments to the child
as plain values and returns what comes back as plain values. So the tests see numbers, texts and
containers whatever the answer redefines, patches, traces or claims. The child is forked before the
keeper reads the program: it gets the answer alone and never holds the tests or what they expect.
program.json: answer; helpers and tests, which the keeper runs; names, which of the answer's
functions and classes the tests may call.

The containments, the better one first (grade.containment chooses):

    namespaces  Linux: mount, network and IPC namespaces for both processes, a pid namespace for the
                child, and a user namespace (root takes a user id that nobody else has instead). The
                root folder is a small tmpfs, the scratch folder, with the Python installation and
                the system's libraries in it, read-only. Everything else, the home folder included,
                is not there. The child is the first process of its pid namespace: all its
                descendants end with it, and it cannot name the keeper.
    limits      resource limits alone: they stop accidents, not attackers

In each: limits on wall and CPU time, memory, processes, file size and open files; a session of
its own; output thrown away; no input, no inherited file.

What is still possible: a program can recognise the arguments of known tests and return what they
expect, and it builds the objects that an MBPP problem sets up from the answer's classes. Under
"limits" it can attack the keeper. Memory is limited for each process, not for all together.
None of this stops an attack on the kernel.
"""
import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
import types
from collections.abc import Iterator, KeysView, ValuesView

REASONS = ("passed", "failed", "error", "memory", "timeout", "ended", "sandbox")
MEMORY = 512 << 20                       # bytes of address space a process
PROCESSES = 8                            # processes and threads in all
OPEN_FILES = 32
FILE_SIZE = 16 << 20                     # bytes a file, and the same for the whole scratch folder
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")

# Numbers of the Linux kernel: <sched.h>, <sys/mount.h>, <sys/prctl.h>, <linux/capability.h>.
NEW_NS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND = 1, 2, 4, 32, 4096
RECURSIVE, PRIVATE, DETACH = 1 << 14, 1 << 18, 2
PARENT_DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38
CAPABILITY_VERSION = 0x20080522


def call(name: str, *arguments):
    """Call a function of the C library; a failure is an OSError."""
    arguments = [os.fsencode(a) if isinstance(a, str) else a for a in arguments]
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


# ---------------------------------------------------------------- containment

def enter_namespaces():
    """Leave the system's mounts, network and user ids; the next child starts a pid namespace."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", NEW_NS | NEW_IPC | NEW_PID | NEW_NET | (NEW_USER if user else 0))
    maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    for name, line in maps.items() if user else ():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def hide_files(scratch: str, owner: int):
    """Make a small tmpfs of this owner, with the libraries in it, the root and working folder.

    Works on the mount namespace of this process: call it after enter_namespaces.
    """
    safe = NO_SUID | NO_DEVICES
    os.umask(0o022)
    call("mount", None, "/", None, RECURSIVE | PRIVATE, None)
    call("mount", "tmpfs", scratch, "tmpfs", safe,
         f"size={FILE_SIZE},nr_inodes=500,mode=700,uid={owner}")
    for folder in (*LIBRARIES, sys.base_prefix):
        inside = scratch + folder
        if os.path.isdir(folder) and not os.path.isdir(inside):
            os.makedirs(inside)
            call("mount", folder, inside, None, BIND | RECURSIVE, None)
            call("mount", None, inside, None, BIND | REMOUNT | READ_ONLY | safe, None)
    os.chdir(scratch)
    call("pivot_root", ".", ".")                # the old root now lies over the new one
    call("umount2", ".", DETACH)
    os.chdir("/")


def give_up_rights(user: int, seconds: int):
    """Set limits for this process and its children, and become this user, with no way back."""
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: MEMORY,
              resource.RLIMIT_FSIZE: FILE_SIZE, resource.RLIMIT_NPROC: PROCESSES,
              resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        with contextlib.suppress(ValueError, OSError):      # not every system has every limit
            resource.setrlimit(limit, (value, value))
    if user != os.geteuid():
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if sys.platform == "linux":
        call("prctl", PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)     # a change of ids undoes it
        call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())


# ---------------------------------------------------------------- plain values

class Object:
    """What the tests hold in place of an object of the answer's process."""

    def __init__(self, number: int):
        self.number = number


# Name: kinds of values, what such a value is made of, how it is made again.
CONTAINERS = {
    "dict": (dict, dict.items, dict),
    "complex": (complex, lambda x: (x.real, x.imag), lambda parts: complex(*parts)),
    "list": (list, iter, list), "tuple": (tuple, iter, tuple), "set": (set, iter, set),
    "frozenset": (frozenset, iter, frozenset), "bytes": (bytes, iter, bytes),
    "iter": ((Iterator, range, KeysView, ValuesView), iter, iter),
    "object": (Object, lambda x: (x.number,), None),
}


def pack(x, objects: list):
    """A value as JSON: containers and numbers by kind; anything else stays and is named by its
    place in `objects`, so that the tests can hand it back."""
    if x is None:
        return None
    for kind in (bool, int, float, str):                    # a subclass may compare as it likes
        if isinstance(x, kind):
            return kind(x)
    for name, (kinds, parts, _) in CONTAINERS.items():
        if isinstance(x, kinds):
            return [name, [pack(part, objects) for part in parts(x)]]
    objects.append(x)
    return ["object", [len(objects) - 1]]


def unpack(x, known):
    """The value again; known(number) is what stands for an object."""
    if not isinstance(x, list):
        return x
    name, parts = x
    make = CONTAINERS[name][2] or (lambda numbers: known(*numbers))
    return make([unpack(part, known) for part in parts])


# ---------------------------------------------------------------- the two processes

def word_for(error: BaseException) -> str:
    """Which of REASONS an exception is."""
    for kind, word in ((MemoryError, "memory"), (AssertionError, "failed"), (Exception, "error")):
        if isinstance(error, kind):
            return word
    return "ended"                                          # SystemExit, KeyboardInterrupt


def answer_calls(channel):
    """Call what the keeper asks for; send back what it returns or how it ended.

    The first request has no name: it runs the answer, whose functions the others call.
    """
    module, objects = types.ModuleType("program"), []
    sys.modules["program"] = module             # not __main__: examples of use do not run
    for line in channel:
        try:
            name, args, named = json.loads(line)
            args, named = (unpack(x, objects.__getitem__) for x in (args, named))
            run = getattr(module, name) if name else lambda answer: exec(answer, module.__dict__)
            reply = ["value", pack(run(*args, **named), objects)]
        except BaseException as error:
            reply = [word_for(error), None]
        channel.write(json.dumps(reply) + "\n")
        channel.flush()


class Ended(BaseException):
    """The answer's process did not return a value; the word says why."""


def run_tests(program: dict, channel) -> str:
    """Run helpers and tests with stand-ins for the answer's names: one of REASONS."""
    def stand_in(name):
        def ask(*args, **named):
            channel.write(json.dumps([name, pack(args, []), pack(named, [])]) + "\n")
            channel.flush()
            word, value = json.loads(channel.readline() or '["ended", null]')
            if word != "value":
                raise Ended(word)
            return unpack(value, Object)
        return ask

    space = {"__name__": "tests"}
    try:
        exec(program["helpers"], space)
        space.update({name: stand_in(name) for name in program["names"]})
        stand_in("")(program["answer"])
        exec(program["tests"], space)
    except Ended as end:
        return str(end) if str(end) in REASONS[1:-1] else "ended"
    except ConnectionError:
        return "ended"
    except BaseException as error:
        return word_for(error)
    return "passed"


def out_of_time(*_):
    raise Ended("timeout")


def keep(containment: str, seconds: float) -> str:
    """Run the program on standard input in a contained child: one of REASONS.

    seconds: of wall time. The limit of CPU time is above: it ends what no handler can interrupt.
    """
    ours, theirs = socket.socketpair()
    user = os.geteuid()
    if containment == "namespaces":
        user = user or 1 << 30 | os.getpid()    # RLIMIT_NPROC counts by user id, and exempts root
        enter_namespaces()
        hide_files(os.getcwd(), user)
    child, leave = os.fork(), os._exit          # which the answer may patch
    if child == 0:
        try:
            os.setsid()
            give_up_rights(user, int(seconds) + 2)
            for standard in (0, 1):
                os.dup2(2, standard)            # grade.run_program's /dev/null
            ours.close()
            answer_calls(theirs.makefile("rw", encoding="utf-8"))
        finally:
            leave(1)
    theirs.close()
    give_up_rights(user, int(seconds) + 2)
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with contextlib.redirect_stdout(None):
        word = run_tests(json.load(sys.stdin), ours.makefile("rw", encoding="utf-8"))
    signal.alarm(0)
    with contextlib.suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return word


if __name__ == "__main__":
    sys.path.pop(0)                             # this file's folder: the program imports none of it
    sys.set_int_max_str_digits(0)
    print(keep(sys.argv[1], float(sys.argv[2])))
