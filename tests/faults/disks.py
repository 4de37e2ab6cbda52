"""Small disks for a test, mounted in a user namespace, without root privileges."""

import functools
import shutil
import subprocess

import pytest

from tests.faults.harness import HERE

IN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


@functools.cache
def why_not() -> str:
    """Why they are unavailable on this machine; "" if they are available."""
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        return "no unshare or nsenter"
    mounted = subprocess.run([*IN_NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    return mounted.stderr.strip()


class Disk:
    """A small file system, mounted on a folder for the processes started `under` it only.

    Args:
        place: the folder.
        size: its size in KiB.
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
        self.inside = type(place)(f"/proc/{self.keeper.pid}/root{place}")  # its contents as seen from outside

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.keeper.kill()
        self.keeper.communicate()

    def fill(self):
        """Fill the disk completely."""
        with (self.inside / "ballast").open("wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(4096))
            except OSError:
                pass

    def make_room(self):
        """Delete the file that fills the disk."""
        (self.inside / "ballast").unlink()

    def read_only(self, yes=True):
        """Make the disk read-only, or writable."""
        option = "ro" if yes else "rw"
        subprocess.run([*self.under, "mount", "-o", f"remount,{option}", str(self.place)], check=True)
