"""Small disks of a test's own, in a user namespace, which needs no rights."""

import functools
import shutil
import subprocess

import pytest

from tests.faults.harness import HERE

IN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


@functools.cache
def why_not() -> str:
    """Why there can be none here, or nothing."""
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        return "no unshare or nsenter"
    mounted = subprocess.run([*IN_NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    return mounted.stderr.strip()


class Disk:
    """A file system of some KiB, mounted on a folder for those processes only that are started `under` it.

    Args:
        place: the folder.
        size: in KiB.
    """

    def __init__(self, place, size):
        if reason := why_not():
            pytest.skip(f"no disk of one's own: {reason}")
        place.mkdir()
        self.place = place
        mount = f"mount -t tmpfs -o size={size}k none {place} && echo ready && exec sleep 1000"
        line = [*IN_NAMESPACE, "sh", "-c", mount]
        self.keeper = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        assert self.keeper.stdout.readline() == "ready\n"
        enter = ("nsenter", f"--target={self.keeper.pid}", "--user", "--mount", "--preserve-credentials")
        self.under = (*enter, "sh", "-c", f'cd {HERE} && exec "$@"', "sh")
        self.inside = type(place)(f"/proc/{self.keeper.pid}/root{place}")  # what is on it, seen from outside

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.keeper.kill()
        self.keeper.communicate()

    def fill(self):
        """Leave not one page."""
        with (self.inside / "ballast").open("wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(4096))
            except OSError:
                pass

    def make_room(self):
        """Take away what filled it."""
        (self.inside / "ballast").unlink()

    def read_only(self, yes=True):
        """Let nobody write to it, or everybody."""
        option = "ro" if yes else "rw"
        subprocess.run([*self.under, "mount", "-o", f"remount,{option}", str(self.place)], check=True)
