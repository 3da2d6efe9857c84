"""A switch between network namespaces that holds every frame for a while and loses some: for kernels without netem.

usage: slow_switch.py DELAY_MS LOSS_PERCENT NAMESPACE...
Gives each namespace a TAP device named eth0 (addresses are the caller's), prints "up", and forwards until it is ended.
"""

import collections
import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0002, 0x1000, 0x40000000
FRAMES_AT_ONCE, FRAME_BYTES_MAX, QUEUE_MAX = 64, 65536, 20_000
libc = ctypes.CDLL(None, use_errno=True)


def enter(namespace):
    fd = os.open(namespace, os.O_RDONLY)
    if libc.setns(fd, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(fd)


def tap_in(name):
    enter(f"/run/netns/{name}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI))
    return tap


def frames(tap):
    for _ in range(FRAMES_AT_ONCE):
        try:
            yield os.read(tap, FRAME_BYTES_MAX)
        except BlockingIOError:
            return


def main():
    delay, loss = float(sys.argv[1]) / 1e3, float(sys.argv[2]) / 100
    taps = [tap_in(name) for name in sys.argv[3:]]
    port_of = {}  # station address -> TAP
    waiting = collections.deque()  # (when, TAP, frame): all wait equally long, so the first is always due first
    chance = random.Random(1)
    print("up", flush=True)
    while True:
        while waiting and waiting[0][0] <= time.monotonic():
            _, tap, frame = waiting.popleft()
            try:
                os.write(tap, frame)
            except OSError:
                pass  # A device that is down or full loses frames, as wires do.
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 1.0
        for tap in select.select(taps, [], [], patience)[0]:
            for frame in frames(tap):
                to, of = frame[:6], frame[6:12]
                port_of[of] = tap
                known = port_of.get(to) if not to[0] & 1 else None
                for port in [known] if known is not None else [t for t in taps if t != tap]:
                    if chance.random() >= loss and len(waiting) < QUEUE_MAX:
                        waiting.append((time.monotonic() + delay, port, frame))


main()
