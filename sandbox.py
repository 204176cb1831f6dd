"""The child that grade.run_program starts: contain one generated program, run it, say how it ended.

    python -s -S sandbox.py CONTAINMENT CPU WALL < program.py      # seconds; in an empty folder

This process, the keeper, is outside of the containment; the program runs in a child of it. What
the keeper prints is one word of REASONS. The containments, best first (grade.containment chooses):

    namespaces  Linux: pid, mount, network and IPC namespaces of its own, a user namespace too (as
                root a user id that nobody else has). The root folder is a small tmpfs with the
                Python installation and the system's libraries in it, read-only; everything else,
                the home folder included, is not there. Processes end with their namespace.
    user        root where namespaces are refused: a user id that nobody else has
    limits      resource limits alone: they stop accidents, not attackers

In each: limits on wall and CPU time, memory, processes, file size and open files; a session of
its own; output thrown away; no environment, no input, no inherited file.

To have passed, the program's process has to send back a random token, which run_tests does after
the program's last line: exit codes, printed words and patched functions claim nothing. It does
not stop a program that looks for the token in the interpreter's frames, skips assertions with a
trace function, or returns objects that equal everything. Nor does any of this stop an attack on
the kernel, and memory is limited for each process, not for all of them together.
"""
import contextlib
import ctypes
import math
import os
import resource
import select
import signal
import sys
import time
import types

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
PARENT_DEATH_SIGNAL, SUBREAPER, NO_NEW_PRIVILEGES = 1, 36, 38
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
        call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())


def end_with_parent(pipe: int):
    """Have the kernel kill this process when its parent ends, who reads the pipe; or leave now.

    After a change of user ids, which undoes it. The parent may have ended before: then the pipe
    has no reader. (Where there is no such signal, only this last is looked at.)
    """
    if LINUX:
        call("prctl", PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    watch = select.poll()
    watch.register(pipe, 0)
    if watch.poll(0):
        os._exit(1)


def close_files(report: int) -> int:
    """Nothing to read, nowhere to write but the keeper's pipe: its number from now on."""
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    report = os.dup2(report, 3, inheritable=False)
    os.closerange(4, 100)                                   # the keeper has a handful
    return report


# ---------------------------------------------------------------- the program's process

def run_tests(program: bytes, token: str, report: int):
    """Run a program to its end, send the token or the reason why not, and leave at once.

    What it needs afterwards is held in local names: the program may patch the modules. It is not
    __main__: what an answer does under that name is an example of use, not part of the answer.
    """
    write, leave = os.write, os._exit
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
        word = token
    except AssertionError:
        word = "failed"
    except MemoryError:
        word = "memory"
    except Exception:
        word = "error"
    except BaseException:                                   # SystemExit, KeyboardInterrupt
        word = "ended"
    write(report, word.encode())
    leave(0)


# ---------------------------------------------------------------- the keeper

def descendants() -> list[int]:
    """The keeper's own children, orphans that it inherited included (Linux; elsewhere none)."""
    found = []
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{int(entry)}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(entry))
    return found


def end_all():
    """Kill what is left of the program, until nothing is; two seconds at most."""
    deadline = time.monotonic() + 2
    with contextlib.suppress(ChildProcessError):           # raised when there is no child any more
        while time.monotonic() < deadline:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            for child in descendants():
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)


def keep(containment: str, cpu: int, wall: float) -> str:
    """Run the program on standard input in a contained child: one of REASONS.

    cpu and wall: seconds. The CPU's are what a program is given; wall time ends those that wait.
    """
    program, token = sys.stdin.buffer.read(), os.urandom(16).hex()
    reading, report = os.pipe()
    if LINUX:
        with contextlib.suppress(OSError):      # if memory runs out, the kernel takes these first
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")
        call("prctl", SUBREAPER, 1, 0, 0, 0)
    if containment == "namespaces":
        enter_namespaces()
        hide_files(os.getcwd())
    end_with_parent(1)
    keeper = os.getpid()
    first = os.fork()
    if not first:
        try:
            if containment == "namespaces":
                os.setsid()
            report = close_files(report)
            try:
                give_up_rights(containment, keeper, cpu)
                end_with_parent(report)
            except OSError:
                os.write(report, b"sandbox")
                os._exit(1)
            run_tests(program, token, report)
        finally:
            os._exit(1)
    os.close(report)
    deadline = time.monotonic() + wall
    ended, status, used = os.wait4(first, os.WNOHANG)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.002)
        ended, status, used = os.wait4(first, os.WNOHANG)
    if not ended:
        os.kill(first, signal.SIGKILL)
    end_all()
    os.set_blocking(reading, False)
    try:
        word = os.read(reading, 100).decode(errors="replace")
    except BlockingIOError:                     # nothing came, but somebody holds the other end
        word = ""
    if word == token:
        return "passed"
    if word in REASONS[1:]:
        return word
    # The kernel counts ticks for the limit, and run time for what was used: they differ a little.
    stopped = os.WIFSIGNALED(status) and used.ru_utime + used.ru_stime > 0.8 * cpu
    return "timeout" if stopped or not ended else "ended"


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
