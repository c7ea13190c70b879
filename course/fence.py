"""Limits of a process that the kernel keeps, whatever runs in it: on computing, memory, and all files but a few.

Files are fenced by Landlock, in Linux since 5.13 and in most containers. Elsewhere `version` is 0: then grade in a
container of your own.
"""

import ctypes
import os
import signal
import struct

try:
    import resource
except ImportError:  # not on Windows
    resource = None

MEGABYTE = 2**20
MEMORY, FILE_SIZE = 2048 * MEGABYTE, 16 * MEGABYTE
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, on every architecture
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
READ, OF_FILES = READ_FILE | READ_DIR, READ_FILE | WRITE_FILE
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights to files a version of Landlock knows; 16 from version 5 on
PARENT_DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38  # options of prctl


def limit_memory():
    """Also: no large file, no core dump, no other process, and an end when the process that forked this one ends.

    To root the kernel allows other processes all the same.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if hasattr(os, "uname") and os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def limit_computing(seconds):
    """From now on so many seconds of processor time, rounded up; then SIGXCPU ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds + 0.999), hard))


def version():
    """Of Landlock in this kernel; 0 without it."""
    try:
        return max(0, ctypes.CDLL(None).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1))
    except (OSError, TypeError, AttributeError):  # Windows, macOS
        return 0


def restrict(readable, writable):
    """From now on this process may read what lies below these paths, write below `writable`, and no more: no other
    file, no program, no TCP connection, no signal to other processes. Nothing happens where there is no Landlock."""
    known = version()
    if not known:
        return
    libc = ctypes.CDLL(None)
    every = (1 << RIGHTS.get(known, 16)) - 1
    handled = struct.pack("QQQ", every, 3 if known >= 4 else 0, 2 if known >= 6 else 0)  # files, TCP, signals
    ruleset = libc.syscall(CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    for path, rights in [*((path, READ) for path in readable), *((path, every & ~EXECUTE) for path in writable)]:
        if os.path.exists(path):
            rights = rights if os.path.isdir(path) else rights & OF_FILES
            place = os.open(path, os.O_PATH)
            libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0)
            os.close(place)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if libc.syscall(RESTRICT_SELF, ruleset, 0):
        raise OSError("the kernel has Landlock, but refuses to use it")
    os.close(ruleset)
