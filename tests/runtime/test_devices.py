"""Which GPUs a process gets, on hosts that are made up: a script in place of the driver's own tool."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.runtime import devices
from gradcam_worker.settings import Settings

A, B = "GPU-11111111-aaaa", "GPU-22222222-bbbb"
TWO = f"""\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: {A})
GPU 1: NVIDIA H100 80GB HBM3 (UUID: {B})
"""
PARTED = f"""\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: {A})
  MIG 3g.40gb     Device  0: (UUID: MIG-33333333-cccc)
  MIG 3g.40gb     Device  1: (UUID: MIG-44444444-dddd)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: {B})
"""


class Host:
    """The environment of a host whose driver lists what a test says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch
        monkeypatch.setenv("PATH", str(folder))
        for name in ("CUDA_VISIBLE_DEVICES", *devices.FEW_THREADS):
            monkeypatch.delenv(name, raising=False)

    def lists(self, listing: str, *, visible: str | None = None) -> None:
        self.runs(f"/bin/cat <<'END'\n{listing}END\n")
        if visible is not None:
            self._monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def runs(self, script: str) -> None:
        tool = self._folder / "nvidia-smi"
        tool.write_text(f'#!/bin/sh\n[ "$1" = -L ] || exit 9\n{script}')
        tool.chmod(0o755)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def seen(settings: Settings) -> dict[str, str]:
    """By device: what its process sees."""
    return {one.name: one.environment["CUDA_VISIBLE_DEVICES"] for one in devices.choose(settings)}


def test_each_gpu_of_the_host_gets_a_process_that_sees_it_alone(host: Host) -> None:
    host.lists(TWO)
    assert seen(Settings()) == {"GPU 0": A, "GPU 1": B}
    assert seen(Settings(devices="1")) == {"GPU 1": B}
    assert seen(Settings(devices=" 1, 0 ")) == {"GPU 1": B, "GPU 0": A}
    assert seen(Settings(devices="1,0")) == {"GPU 1": B, "GPU 0": A}


def test_the_parts_of_a_gpu_take_its_place(host: Host) -> None:
    host.lists(PARTED)
    assert list(seen(Settings()).values()) == ["MIG-33333333-cccc", "MIG-44444444-dddd", B]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", ["1"]),
        (f"{B}, 0", [B, "0"]),
        ("0,2,1", ["0"]),  # there is no 2: as CUDA reads it, the list ends there
        ("1,-1,0", ["1"]),
    ],
)
def test_gpus_that_are_made_visible_beforehand_are_all_there_are(
    host: Host, visible: str, expected: list[str]
) -> None:
    host.lists(TWO, visible=visible)
    assert list(seen(Settings()).values()) == expected
    assert seen(Settings(devices="0")) == {"GPU 0": expected[0]}, "numbers count the visible ones"


@pytest.mark.parametrize("visible", ["", "-1", "none"])
def test_where_no_gpu_is_visible_there_is_one_process_as_the_environment_says(
    host: Host, visible: str
) -> None:
    host.lists(TWO, visible=visible)
    assert seen(Settings()) == {"default device": visible}


def test_without_a_gpu_there_is_one_process_with_whatever_its_backend_finds(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_local_gpus", lambda *_: [])  # whatever this machine has
    (only,) = devices.choose(Settings())
    assert "CUDA_VISIBLE_DEVICES" not in only.environment
    assert only.environment["GRADCAM_THREADS"] == str(Settings().threads)


def test_on_the_cpu_no_gpu_is_seen(host: Host) -> None:
    host.lists(TWO)
    assert seen(Settings(devices="cpu")) == {"cpu": ""}


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("3", rf"asks for GPU 3; there are: 0 \({A}\), 1 \({B}\)\."),
        ("0,2", "asks for GPU 2"),
        ("1,1", "names GPU 1 twice"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_with_what_there_is(host: Host, wish: str, expected: str) -> None:
    host.lists(TWO)
    with pytest.raises(InvalidSettings, match=expected):
        devices.choose(Settings(devices=wish))


def test_no_gpu_at_all_is_said(host: Host) -> None:
    host.lists(TWO, visible="")
    with pytest.raises(InvalidSettings, match=r"asks for GPU 0; there are: none\."):
        devices.choose(Settings(devices="0"))


@pytest.mark.parametrize("script", ["exit 9", "exec /bin/sleep 60", "echo nothing that is known"])
def test_a_driver_whose_tool_says_nothing_is_counted_by_its_files(
    host: Host, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "LISTING_TIMEOUT_S", 0.2)
    host.runs(script)
    for name in ("nvidia3", "nvidia5", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert devices.visible_gpus({"PATH": str(tmp_path)}, tmp_path) == ["0", "1"]
    assert devices.visible_gpus({"PATH": ""}, tmp_path) == ["0", "1"], "nor where there is no such tool"


def test_a_gpu_gets_twice_as_many_jobs_as_its_largest_batch_unless_told_otherwise(host: Host) -> None:
    host.lists(TWO)

    def threads(settings: Settings) -> list[str]:
        return [one.environment["GRADCAM_THREADS"] for one in devices.choose(settings)]

    assert threads(Settings()) == ["64", "64"]
    assert threads(Settings(max_batch=12)) == ["24", "24"]
    assert threads(Settings(threads=3)) == ["3", "3"]
    assert threads(Settings(devices="cpu")) == [str(Settings().threads)]


@pytest.mark.parametrize("variable", devices.FEW_THREADS)
def test_opencv_and_obstore_have_one_thread_unless_the_operator_says_otherwise(
    host: Host, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    host.lists(TWO)
    assert [one.environment[variable] for one in devices.choose(Settings())] == ["1", "1"]
    monkeypatch.setenv(variable, "4")
    assert [one.environment[variable] for one in devices.choose(Settings())] == ["4", "4"]


def test_a_process_without_a_supervisor_takes_the_one_device_that_it_is_given(host: Host) -> None:
    host.lists(TWO)

    def entered(wish: str) -> list[str]:
        program = f"""
import os
from gradcam_worker.runtime.devices import use_single_device
from gradcam_worker.settings import Settings
print(use_single_device(Settings(devices={wish!r})).threads, os.environ["CUDA_VISIBLE_DEVICES"])
"""
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return (done.stdout or done.stderr).splitlines()

    assert entered("1") == [f"64 {B}"]
    assert "computes on one device, not on 2: name it" in entered("auto")[-1]


def test_a_gpu_is_known_as_one(host: Host) -> None:
    host.lists(TWO)
    assert [one.is_gpu for one in devices.choose(Settings())] == [True, True]
    assert [one.is_gpu for one in devices.choose(Settings(devices="cpu"))] == [False]


NESTED = "0::/kubepods/pod1/container2\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (None, {}, 64),
        (NESTED, {}, 64),
        (NESTED, {"cpu.max": "250000 100000"}, 2),  # a container: the names are the host's
        (NESTED, {"cpu.max": "max 100000", "kubepods/pod1/container2/cpu.max": "max 100000"}, 64),
        (NESTED, {"kubepods/pod1/cpu.max": "300000 100000"}, 3),
        (
            NESTED,
            {"kubepods/pod1/cpu.max": "300000 100000", "kubepods/pod1/container2/cpu.max": "9900000 100000"},
            3,
        ),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "unheard of"}, 64),
        (
            "4:cpu,cpuacct:/docker/ab\n2:cpuset:/x\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            4,
        ),
        (
            "4:cpu,cpuacct:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            64,
        ),
    ],
)
def test_the_cores_are_those_that_the_control_group_allows(
    groups: str | None,
    files: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    assert devices.usable_cores(tmp_path) == expected


def test_a_process_that_is_bound_to_a_core_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7})
    assert devices.usable_cores() == 1
